"""Hyperparameter search with Optuna for the lowest held-out loss, in rounds of trials trained in lockstep.

The ``search`` key of a sweep configures it. Each trial is an experiment (``trial-000`` and so on); ``search.json``
holds the drawn parameters. The sampler learns from the trials of previous rounds; a pruner may stop a trial at an
evaluation during training. A search that was killed can resume: finished trials are reported to a new study, and the
others run again or resume.
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
from train.sweeps.group import DROPPED, LmCache, group_experiments, log, resume_hint, train_group, unfinished
from train.trainer.trainer import Interrupted

if TYPE_CHECKING:
    import optuna

TRIALS = "search.json"


def search(config: SweepConfig, configs: list[TrainConfig]) -> None:
    """Run the trials of ``config``; append each trial to ``configs`` when it is drawn.

    Raises:
        UserError: optuna is not installed, or the settings of a trial are invalid.
        Interrupted: a signal arrived; all trials are saved.
    """
    settings = config.search
    if settings is None:
        raise ValueError("the sweep has no search key")
    study = _study(settings)
    path = config.folder / TRIALS
    drawn: list[dict[str, Any]] = runs.read_json(path)["trials"] if path.is_file() else []
    lm_cache = LmCache()
    with StopRequest() as stop:
        for start in range(0, settings.trials, settings.max_concurrent_trials):
            trials: dict[str, optuna.Trial] = {}
            round_configs = []
            for number in range(start, min(start + settings.max_concurrent_trials, settings.trials)):
                if number < len(drawn):  # drawn in an earlier session
                    study.enqueue_trial(drawn[number])
                trial = study.ask()
                values = _draw(trial, settings)
                name = f"trial-{number:03d}"
                round_configs.append(experiment_config(config, values, name))
                trials[name] = trial
                if number == len(drawn):
                    drawn.append(trial.params)
            runs.write_json(path, {"trials": drawn})
            configs.extend(round_configs)
            for name, trial in trials.items():
                for line in read_jsonl(config.folder / name / EVALUATIONS):
                    trial.report(line["val_loss"], line["step"])
            _run(round_configs, trials, config, lm_cache, stop)
            for name, trial in trials.items():
                _report_result(study, trial, config.folder / name)


def _study(settings: SearchConfig) -> optuna.Study:
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
    return optuna.create_study(
        sampler=samplers[settings.sampler](seed=settings.seed), pruner=pruners[settings.pruner]()
    )


def _draw(trial: optuna.Trial, settings: SearchConfig) -> dict[str, Any]:
    """Draw a value for each dotted key of the space."""
    values: dict[str, Any] = {}
    for key, space in settings.space.items():
        if isinstance(space, Choices):  # Optuna supports only scalar choices: draw the index instead
            values[key] = space.choices[trial.suggest_categorical(key, range(len(space.choices)))]
        elif isinstance(space.low, int) and isinstance(space.high, int):
            values[key] = trial.suggest_int(key, space.low, space.high, log=space.log)
        else:
            values[key] = trial.suggest_float(key, space.low, space.high, log=space.log)
    return values


def _run(
    round_configs: list[TrainConfig],
    trials: Mapping[str, optuna.Trial],
    config: SweepConfig,
    lm_cache: LmCache,
    stop: StopRequest,
) -> None:
    """Run the unfinished trials of one round."""

    def report(name: str, step: int, loss: float) -> str | None:
        trials[name].report(loss, step)
        reason = f"held-out loss {loss:.4f} at step {step} is worse than that of other trials"
        return reason if trials[name].should_prune() else None

    for part in group_experiments(unfinished(round_configs), 1 if config.lockstep == "none" else None):
        log(f"trials: {', '.join(str(each.name) for each in part)}")
        try:
            train_group(part, lm_cache, config.lockstep, stop, log, report)
        except Interrupted as stopped:
            raise Interrupted(f"{stopped}; {resume_hint(config.folder)}") from None


def _report_result(study: optuna.Study, trial: optuna.Trial, run: Path) -> None:
    """Report the result of a trial to the study: its held-out loss, or that it was pruned or failed."""
    from optuna.trial import TrialState

    if (run / DROPPED).is_file():
        pruned = runs.read_json(run / DROPPED)["state"] == "pruned"
        study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    else:
        study.tell(trial, runs.read_json(run / "summary.json")["val_loss"])
