import threading
import time

from pipeline.room import Room


def test_one_who_needs_the_room_is_alone_in_it():
    room, inside, seen = Room(2), [], []

    def stay(whole):
        for _ in range(20):
            with room.whole() if whole else room.place():
                inside.append(whole)
                time.sleep(0.001)
                seen.append(tuple(inside))
                inside.remove(whole)

    threads = [threading.Thread(target=stay, args=(whole,)) for whole in (True, True, False, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 100
    assert max(map(len, seen)) == 2
    assert all(len(people) == 1 for people in seen if True in people)
