"""What GradCache is for: the memory of a chunk, whatever the batch. The benchmark in small, each step in a process of its own."""

import pytest

from benchmarks.gradcache import measure


@pytest.fixture(autouse=True)
def exact_heap(monkeypatch):
    """Large buffers go back to the system when freed: how glibc's heap happens to be cut moves the peak by up to 80 MiB otherwise."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1024 * 1024))


def test_peak_memory_is_flat_from_512_pairs_to_4096():
    """8 times the pairs: the vectors and their gradients grow (measured: 76 to 90 MiB), the activations of a chunk do not; a plain step takes 640."""
    small, large = measure("text", "ours", 512), measure("text", "ours", 4_096)
    assert large["peak_mib"] < 1.35 * small["peak_mib"]
    plain = measure("text", "plain", 512)
    assert plain["peak_mib"] > 5 * small["peak_mib"]
    assert abs(plain["loss"] - small["loss"]) < 1e-4
