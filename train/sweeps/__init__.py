"""Sweeps: experiments trained in lockstep, sharing batches and one frozen language model, with paired comparisons."""
