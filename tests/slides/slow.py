"""A store that is slow: an HTTP server that gives ranges at once and whole files a little at a time."""

import contextlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STEPS = 20


@contextlib.contextmanager
def slow_store(folder: Path, *, seconds: float, stalls: bool = False):
    """Gives the URL of `folder`. A whole file takes `seconds`; with `stalls` it comes at once but for its last bytes."""

    class Serves(BaseHTTPRequestHandler):
        def do_GET(self):
            data = (folder / self.path.lstrip("/")).read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hash(data)}"')
            if asked:
                self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            step = -(-len(part) // STEPS)
            for number in range(STEPS):
                if not asked and (not stalls or number == STEPS - 1):
                    time.sleep(seconds if stalls else seconds / STEPS)
                with contextlib.suppress(OSError):  # whoever asked may be gone
                    self.wfile.write(part[number * step : (number + 1) * step])

        do_HEAD = do_GET

        def log_message(self, *said):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Serves)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
