"""A search by Optuna: trials drawn a few at a time, run in lockstep, judged by their held-out loss.

In: the ``search`` key of a sweep. Out: an experiment a trial, ``trial-000`` and so on, and ``search.json``: what was
drawn. The sampler learns from the trials of the rounds before; a pruner may end a trial at an evaluation on the way.
A search that was killed goes on: its finished trials are told to a new study, the others run again or go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import missing_package
from train.config.train import TrainConfig
from train.distributed.signals import StopRequest
from train.runs import folder as runs
from train.runs.metrics_log import EVALUATIONS, read_jsonl
from train.sweeps.config import Choices, SearchConfig, SweepConfig, experiment_config
from train.sweeps.group import DROPPED, LmCache, LockstepTrainer, group_experiments, log, resume_hint, unfinished
from train.trainer.trainer import Interrupted

if TYPE_CHECKING:
    import optuna

TRIALS = "search.json"


def search(config: SweepConfig, configs: list[TrainConfig]) -> None:
    """Run the trials of ``config``; each is added to ``configs`` when it is drawn.

    Raises:
        UserError: optuna is not installed, or a trial's settings are bad.
        Interrupted: a signal came; all is saved.
    """
    wanted = config.search
    if wanted is None:
        raise ValueError("this sweep has no search")
    study = _study(wanted)
    path = config.folder / TRIALS
    drawn: list[dict[str, Any]] = runs.read_json(path)["trials"] if path.is_file() else []
    models = LmCache()
    with StopRequest() as stop:
        for start in range(0, wanted.trials, wanted.max_concurrent_trials):
            trials: dict[str, optuna.Trial] = {}
            fresh = []
            for number in range(start, min(start + wanted.max_concurrent_trials, wanted.trials)):
                if number < len(drawn):  # by an earlier session
                    study.enqueue_trial(drawn[number])
                trial = study.ask()
                values = _draw(trial, wanted)
                name = f"trial-{number:03d}"
                fresh.append(experiment_config(config, values, name))
                trials[name] = trial
                if number == len(drawn):
                    drawn.append(trial.params)
            runs.write_json(path, {"trials": drawn})
            configs.extend(fresh)
            for name, trial in trials.items():
                for line in read_jsonl(config.folder / name / EVALUATIONS):
                    trial.report(line["val_loss"], line["step"])
            _run(fresh, trials, config, models, stop)
            for name, trial in trials.items():
                _report_result(study, trial, config.folder / name)


def _study(wanted: SearchConfig) -> optuna.Study:
    try:
        import optuna
    except ImportError:
        raise missing_package("search", "optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers: dict[str, Any] = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    pruners: dict[str, Any] = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "halving": optuna.pruners.SuccessiveHalvingPruner,
    }
    return optuna.create_study(sampler=samplers[wanted.sampler](seed=wanted.seed), pruner=pruners[wanted.pruner]())


def _draw(trial: optuna.Trial, wanted: SearchConfig) -> dict[str, Any]:
    """A value for each dotted key of the space."""
    values: dict[str, Any] = {}
    for key, space in wanted.space.items():
        if isinstance(space, Choices):  # Optuna knows choices of plain kinds alone: it draws their places
            values[key] = space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
        elif isinstance(space.low, int) and isinstance(space.high, int):
            values[key] = trial.suggest_int(key, space.low, space.high, log=space.log)
        else:
            values[key] = trial.suggest_float(key, space.low, space.high, log=space.log)
    return values


def _run(
    fresh: list[TrainConfig],
    trials: Mapping[str, optuna.Trial],
    config: SweepConfig,
    models: LmCache,
    stop: StopRequest,
) -> None:
    """One round, what of it is not finished."""

    def evaluated(name: str, step: int, loss: float) -> str | None:
        trials[name].report(loss, step)
        return f"{loss:.4f} at step {step} is among the worse" if trials[name].should_prune() else None

    for part in group_experiments(unfinished(fresh), 1 if config.lockstep == "none" else None):
        log(f"trials: {', '.join(str(each.name) for each in part)}")
        try:
            LockstepTrainer(part, models, config.lockstep, stop, log, evaluated).run()
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}, saved; {resume_hint(config.folder)}") from None


def _report_result(study: optuna.Study, trial: optuna.Trial, run: Path) -> None:
    """What came of a trial: its held-out loss, or that it was pruned or failed."""
    from optuna.trial import TrialState

    if (run / DROPPED).is_file():
        pruned = runs.read_json(run / DROPPED)["state"] == "pruned"
        study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    else:
        study.tell(trial, runs.read_json(run / "summary.json")["val_loss"])
