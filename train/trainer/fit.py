"""A run from its settings: the folder, stage 1, the model, what is shown before the first step, and the loop.

python -m train fit --config configs/train/demo.yaml
torchrun --nproc-per-node 2 -m train fit --config configs/train/demo.yaml
python -m train fit --resume runs/demo
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from shards.config.base import flatten
from shards.errors import UserError
from train.config.train import STAGE_ONE, TrainConfig
from train.data.caches import TrainData, open_data, print_notes
from train.distributed.device import choose_device, choose_dtype, flushed_denormals
from train.distributed.group import ProcessGroup
from train.lms.base import choose_max_logits
from train.model.audio_lm import AudioLM
from train.model.build import build_model
from train.model.checkpoint import checkpoints
from train.model.ctc import (
    alignment_note,
    run_tokens,
    stage_one_folder,
    start_from_stage_one,
    uses_tokens,
    write_tokens,
)
from train.model.proof import prove
from train.model.replay import lm_record, write_lm_record
from train.runs import folder as runs
from train.runs.trackers import require_trackers
from train.trainer.state import RunState
from train.trainer.trainer import Trainer

# Keys that may differ between the processes of a run: paths and devices are local to a machine.
PER_PROCESS_KEYS = (
    *("caches", "labels", "extract", "val.caches", "val.labels", "prompt.prompts", "runs", "name", "device"),
)


def fit(
    config: TrainConfig, resume: Path | None = None, group: ProcessGroup | None = None, *, stage_one_only: bool = False
) -> Path:
    """Train a run with the settings ``config``, or resume the run at ``resume``; return the run folder.

    Every process of ``group`` calls this. Rank 0 raises the errors that all ranks share; the others raise SystemExit.

    Args:
        stage_one_only: stop after stage 1; the run then waits to be resumed.

    Raises:
        UserError: the settings or the data are invalid, or the settings or caches of a resumed run changed.
        WorkFailed: the loss became NaN or infinite, or fell by less than ``min_loss_drop``, or another process exited.
        Interrupted: the process received SIGINT or SIGTERM; the run is saved.
    """
    with ExitStack() as held, flushed_denormals():
        return _fit(config, resume, group or ProcessGroup(), held, stage_one_only)


def _fit(config: TrainConfig, resume: Path | None, group: ProcessGroup, held: ExitStack, stage_one_only: bool) -> Path:
    run = resume
    tokens: list[int] | None = None
    with group.raise_on_all_ranks():
        require_trackers(config)
        if group.is_main_process:
            run = resume or runs.new_run_folder(config)
            held.enter_context(runs.hold(run))
            if resume is not None:
                require_resumable(config, resume)
            else:
                runs.require_new(run)  # another process may have made it before this one held it
        device = choose_device(group.local_device(config.device))
        dtype = choose_dtype(config.dtype, device)
        data = open_data(config, *(runs.read_pins(resume) if resume is not None else ()))
        if group.is_main_process:
            print_notes(data.notes)
    run = Path(group.broadcast(str(run)))
    with group.raise_on_all_ranks():
        if uses_tokens(config) or config.is_pretrained:
            tokens = run_tokens(config, data, run)
    begun = resume is not None
    if config.is_pretrained:
        begun = group.broadcast(bool(checkpoints(run / "checkpoints")))
        if config.pretrain.steps and not begun:
            _fit_stage_one(config, run, data, tokens or [], group, device)
        if stage_one_only:
            return run
    _fit_stage_two(config, run, data, tokens, group, device, dtype, begun)
    return run


def _fit_stage_two(
    config: TrainConfig,
    run: Path,
    data: TrainData,
    tokens: list[int] | None,
    group: ProcessGroup,
    device: torch.device,
    dtype: torch.dtype,
    begun: bool,
) -> None:
    """Train with the language model, from the checkpoint of a run that has ``begun``."""
    with group.raise_on_all_ranks():
        spec, size = data.caches[0].spec, data.caches[0].spec.codebook_size
        model = build_model(
            config, spec.channels, device, dtype, run=run if begun else None, tokens=tokens, codebook_size=size
        )
    if not begun:
        model.lm.max_logits = min(group.all_gather(choose_max_logits(device)))
    state = RunState(config, data, model, dtype, run, group)
    if config.is_pretrained and not begun:
        with group.raise_on_all_ranks():
            state.counters.stage_one_seconds = start_from_stage_one(model, stage_one_folder(config, run))
    settings = flatten(config.model_dump(mode="json"))
    common = {key: value for key, value in settings.items() if key not in PER_PROCESS_KEYS}
    ids = {name: value for name, value in lm_record(model.lm, model.prompt).items() if name != "date"}
    group.assert_same(common | state.identity() | {"ids of the prompt": ids})
    if not begun:
        with group.raise_on_all_ranks():
            notes = prove(model, data, config)
            if group.is_main_process:
                print_notes(notes)
                create_folder(run, config, data, model, tokens)
        state.broadcast_initial_weights()
    else:
        state.restore()
    Trainer(config, state, device).train()


def create_folder(
    run: Path,
    config: TrainConfig,
    data: TrainData,
    model: AudioLM,
    tokens: Sequence[int] | None = None,
    latest: bool = True,
) -> None:
    """Write what a run records before its first step; a folder that only has a stage 1 is completed.

    Args:
        tokens: those of a CTC head.
        latest: see :func:`~train.runs.folder.create_run_folder`.
    """
    instructions = model.prompt.instructions
    if not (run / "config.yaml").is_file():
        runs.create_run_folder(run, config, data, instructions, latest=latest)
    elif instructions is not None:
        runs.write_instructions(run, instructions)
    if tokens is not None:
        write_tokens(run, tokens)
    write_lm_record(run, model.lm, model.prompt)


def _fit_stage_one(
    config: TrainConfig, run: Path, data: TrainData, tokens: list[int], group: ProcessGroup, device: torch.device
) -> None:
    """Train or resume stage 1 of ``run``, unless it is finished. All ranks return after rank 0 has written its files.

    Raises:
        UserError: the texts cannot be aligned with the audio.
    """
    folder, stage = run / STAGE_ONE, config.stage_one(str(run))
    if group.broadcast((folder / runs.SUMMARY).is_file()):
        return
    begun, dtype = group.broadcast(bool(checkpoints(folder / "checkpoints"))), torch.float32
    with group.raise_on_all_ranks():
        spec = data.caches[0].spec
        model = build_model(stage, spec.channels, device, dtype, tokens=tokens, codebook_size=spec.codebook_size)
    state = RunState(stage, data, model, dtype, folder, group)
    group.assert_same({"tokens": tokens} | state.identity())
    if begun:
        state.restore()
    else:
        with group.raise_on_all_ranks():
            notes = alignment_note(model.projector, data, stage, model.lm.tokenizer) + prove(model, data, stage)
            if group.is_main_process:
                print_notes(notes)
                if not (run / "config.yaml").is_file():
                    runs.create_run_folder(run, config, data)
                    write_tokens(run, tokens)
                create_folder(folder, stage, data, model, tokens, latest=False)
        state.broadcast_initial_weights()
    Trainer(stage, state, device).train()
    group.broadcast(None)  # stage 2 reads what rank 0 writes last


def require_resumable(config: TrainConfig, run: Path) -> None:
    """Raise UserError if ``run`` is finished, or if ``config`` changes a setting that affects its results."""
    if (run / runs.SUMMARY).is_file():
        raise UserError(f"'{run}' is finished: evaluate it with `python -m train evaluate {run}`, or train a new run")
    changed = runs.saved_config(run).differences(config)
    if changed:
        raise UserError(
            f"'{run}' cannot resume with changed settings ({'; '.join(changed)}): restore them, or train a new run"
        )
