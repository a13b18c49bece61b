"""What GradCache is for: the memory of a chunk, whatever the batch. The benchmark in small, each step in a process of its own."""

from benchmarks.gradcache import measure


def test_peak_memory_is_flat_from_512_pairs_to_4096():
    """8 times the pairs: the vectors and their gradients grow, the activations of a chunk do not; a plain step takes 640 MiB for 512 pairs."""
    small, large = measure("text", "ours", 512), measure("text", "ours", 4_096)
    assert large["peak_mib"] < 1.35 * small["peak_mib"]
    plain = measure("text", "plain", 512)
    assert plain["peak_mib"] > 4 * small["peak_mib"]
    assert abs(plain["loss"] - small["loss"]) < 1e-4
