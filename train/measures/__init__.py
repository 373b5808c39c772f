"""What a model's held-out utterances say about it, one kind of figure a module; ``train/evaluation/evaluate.py`` calls
them.

In: a model and held-out utterances. Out: counts of every utterance (``utterances``), and figures with intervals.

    from train.evaluation.bootstrap import paired_difference
    from train.evaluation.utterance_table import read_utterances
    difference = paired_difference(read_utterances(Path("runs/a")), read_utterances(Path("runs/b")))
"""
