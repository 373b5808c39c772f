"""Many experiments on one cache, in lockstep: each batch read once, one frozen language model, paired comparisons."""
