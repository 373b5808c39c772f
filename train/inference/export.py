"""Export of a trained projector: weights, settings, source code, and a model card.

    python -m train export runs/demo exported/demo

    exported/demo/   projector.safetensors  config.json  lm.json  README.md  projector/*.py  [lm.safetensors]
                     [modeling_earshard.py  earshard_*.py]

Reads a finished run; writes that folder, which depends on neither the run nor its caches. ``lm.safetensors`` is written
if the LM was trained. ``lm.json`` holds what identifies the LM, and the ids of the prompt, as in a run. The folder
appears when it is complete; what a killed export left behind is removed by the next one beside it.

The package ``projector`` in the folder loads the export with only torch and safetensors installed: ``from projector
import load``. :func:`load_projector` does the same with earshard's code and runs no code from the folder.

``modeling_earshard.py`` and the files that it imports are the code of ``transcribe``, with which transformers loads the
export: ``AutoModel.from_pretrained("exported/demo", trust_remote_code=True).transcribe("speech.wav")``, or
``pipeline("automatic-speech-recognition", model="exported/demo", trust_remote_code=True)("speech.wav")``. They are left
out where :func:`not_runnable` says why.
"""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.config.base import validate_config
from shards.errors import UserError
from shards.files import atomic_write, fsync_folder, make_folder, scratch_folder, translate_os_errors
from shards.share.publish import Publication
from train.config.model import CustomConfig
from train.config.train import TrainConfig
from train.data.instructions import Instructions
from train.inference.flatten import flatten
from train.inference.model_card import model_card
from train.inference.settings import (
    FORMAT,
    LM_WEIGHTS,
    MODEL_CARD,
    SETTINGS,
    TASK,
    WEIGHTS,
    ExportConfig,
    InferenceConfig,
    read_settings,
)
from train.model.build import load_model
from train.model.ctc import read_tokens
from train.model.replay import write_lm_record
from train.runs.folder import read_cache_info, read_json, run_config

if TYPE_CHECKING:
    from train.lms.base import LanguageModel
    from train.projectors import Projector

PACKAGE = "projector"
SCRATCH = ".earshard-export-"  # how the name of a folder begins in which an export is written
RECEIVER = "train.inference.receiver"
CUSTOM_MODULE = "own"  # module name of a custom projector in the package
IMPORT_CHECK = """
import sys
sys.modules.update(dict.fromkeys(("train", "pipeline", "shards")))  # as if earshard were not installed
sys.path.insert(0, sys.argv[1])
from projector import load
load(sys.argv[1])
"""


def export(run: Path, folder: Path, kind: str | None = None) -> Path:
    """Write the projector of ``run`` into ``folder``, which must not exist; return ``folder``.

    Args:
        kind: import path of the class of a custom projector. The class that the run names is imported only if it is
            the one passed here.

    Raises:
        UserError: the run is not finished, the folder exists or cannot be written, or the source of a custom projector
            cannot be exported.
    """
    import torch

    from train.model.checkpoint import trained_parameters, write_tensors

    if folder.exists():
        raise _exists(folder)
    config, cache_info = run_config(run, projector=kind), read_cache_info(run)
    if config.is_stage_one:
        raise UserError(
            f"'{run}' is a stage 1, whose projector makes scores and no soft tokens: export the run around it"
        )
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    tokens = read_tokens(run) if model.projector.ctc_head() is not None else []
    settings = make_settings(config, cache_info, model.lm, model.projector, model.prompt.instructions, tokens)
    problem = not_runnable(settings, config, model.lm)
    if not problem:
        settings = settings.model_copy(update=_transformers_keys(config))
    trained = {name: parameter.detach() for name, parameter in trained_parameters(model.lm).items()}
    text = model_card(settings, read_json(run / "summary.json"), folder.name, bool(trained), problem)
    with translate_os_errors("exporting", folder):
        make_folder(folder.parent)
        with scratch_folder(SCRATCH, folder.parent) as scratch:
            partial = scratch / folder.name
            write_projector(partial, settings, model.projector)
            if trained:
                write_tensors(partial / LM_WEIGHTS, trained, {"feature_id": settings.feature_ids[0]})
            write_lm_record(partial, model.lm, model.prompt)
            for name, source in ({} if problem else _receiver_sources(settings)).items():
                atomic_write(partial / name, source.encode(), str(os.getpid()))
            atomic_write(partial / MODEL_CARD, text.encode(), str(os.getpid()))
            try:
                os.rename(partial, folder)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # of another export at the same time
                    raise _exists(folder) from None
                raise
        fsync_folder(folder.parent)
    return folder


def not_runnable(settings: ExportConfig, config: TrainConfig, lm: LanguageModel) -> str:
    """Return why transformers cannot load an export of this run; "" if it can."""
    from shards.format.spec import FeatureSpec
    from train.data.live import require_one_encoder

    if not lm.files:
        return f"its language model, `{settings.lm.model}`, is no model of transformers"
    try:
        require_one_encoder([FeatureSpec.parse(spec, "caches.json") for spec in settings.specs])
    except UserError:
        return "it reads features of several encoders"
    if config.decode.ctc_weight and settings.projector.kind != "posterior":
        return f"its text is decoded {config.decode.description}, and that head (`ctc.weight`) is not in the projector"
    return ""


def _transformers_keys(config: TrainConfig) -> dict[str, Any]:
    """Return what ``config.json`` holds for transformers and for ``modeling_earshard.py``."""
    return {
        "inference": InferenceConfig(
            dtype=config.dtype,
            max_new_tokens=config.max_new_tokens,
            decode=config.decode,
            order_seed=config.order_seed,
            val_seed=config.val.seed,
        ),
        "model_type": "earshard",
        "architectures": ["EarshardModel"],
        "auto_map": {
            "AutoConfig": "modeling_earshard.EarshardConfig",
            "AutoModel": "modeling_earshard.EarshardModel",
        },
        "custom_pipelines": {TASK: {"impl": "modeling_earshard.EarshardPipeline", "pt": ["AutoModel"]}},
    }


def _receiver_sources(settings: ExportConfig) -> dict[str, str]:
    """File names and contents of the code with which transformers loads the export."""
    module, name = settings.source.split(":")
    replaced = {f"{RECEIVER}.projector_class": f"from train.projectors.{module} import {name} as ProjectorClass\n"}
    if isinstance(settings.projector, CustomConfig):
        replaced[f"train.projectors.{CUSTOM_MODULE}"] = _read_source(settings.projector.kind.split(":")[0])
    return flatten(f"{RECEIVER}.modeling_earshard", replaced)


def _exists(folder: Path) -> UserError:
    return UserError(f"'{folder}' already exists: name another folder, or delete it")


def write_projector(folder: Path, settings: ExportConfig, projector: Projector) -> None:
    """Create ``folder`` with settings, weights and source: the part of an export that is needed to load it.

    Raises:
        UserError: see :func:`export`.
    """
    from train.model.checkpoint import write_tensors

    sources = _sources(settings)
    with translate_os_errors("exporting", folder):
        (folder / PACKAGE).mkdir(parents=True)
        for name, text in sources.items():
            atomic_write(folder / PACKAGE / name, text.encode(), str(os.getpid()))
        tree = json.dumps(settings.model_dump(mode="json"), indent=1) + "\n"
        atomic_write(folder / SETTINGS, tree.encode(), str(os.getpid()))
    # frozen parameters and buffers too; clone() because safetensors refuses tensors that share memory
    tensors = {name: value.detach().clone() for name, value in projector.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {"feature_id": settings.feature_ids[0]})
    if isinstance(settings.projector, CustomConfig):
        _check_custom(folder, settings.projector.kind)


def make_settings(
    config: TrainConfig,
    cache_info: dict[str, Any],
    lm: LanguageModel,
    projector: Projector,
    instructions: Instructions | None = None,
    tokens: Sequence[int] = (),
) -> ExportConfig:
    """Return ``config.json`` of an export of a run with these settings, ``caches.json``, LM and trained projector."""
    from shards.format.spec import FeatureSpec
    from train.projectors import CodesProjector, MixedProjector

    specs = cache_info.get("layers") or [cache_info["spec"].model_dump()]
    while isinstance(projector, CodesProjector | MixedProjector):
        projector = projector.projector
    kind = type(projector)
    module = CUSTOM_MODULE if isinstance(config.projector, CustomConfig) else kind.__module__.rpartition(".")[2]
    return ExportConfig(
        format=FORMAT,
        projector=config.projector,
        source=f"{module}:{kind.__name__}",
        layers=config.layers,
        normalise_layers=config.normalise_layers,
        channels=cache_info["spec"].channels,
        code_dim=config.code_dim if cache_info["spec"].codebook_size else 0,
        width=lm.width,
        embedding_rms=lm.embedding_rms,
        lm=config.lm,
        lm_identity=lm.identity,
        prompt=config.prompt,
        instructions={} if instructions is None else {task: list(own) for task, own in instructions.by_task.items()},
        specs=specs,
        feature_ids=[FeatureSpec.parse(spec, "caches.json").feature_id for spec in specs],
        manifest_ids=[cache["manifest_id"] for cache in cache_info["caches"]],
        encoder=cache_info.get("encoder"),
        tokens=list(tokens),
    )


def _sources(settings: ExportConfig) -> dict[str, str]:
    """File names and contents of the package: the loader, the projector's module, and the modules that they import."""
    module = settings.source.split(":")[0]
    config = settings.projector
    text = _custom_source(config.kind.split(":")[0]) if isinstance(config, CustomConfig) else _source(module)
    return _with_imports("__init__", _source("standalone")) | _with_imports(module, text)


def _with_imports(module: str, text: str) -> dict[str, str]:
    """File names and contents of ``module`` and of the modules that it imports relatively."""
    found = {f"{module}.py": text}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and (source := _source(node.module or "")):
            found |= _with_imports(node.module or "", source)
    return found


def _source(module: str) -> str:
    """Source of a module of ``train.projectors``; empty if there is no such module."""
    file = files("train.projectors") / f"{module}.py"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _custom_source(module: str) -> str:
    """The source of the user's module; its imports from ``train`` and ``train.projectors`` become relative.

    Raises:
        UserError: the source cannot be read.
    """
    local = re.compile(r"^(\s*)from train(?:\.projectors(\.\w+)?)? import\b", re.MULTILINE)
    return local.sub(lambda found: f"{found[1]}from {found[2] or '.'} import", _read_source(module))


def _read_source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError) as error:
        raise UserError(
            f"the source of '{module}', which an export includes, cannot be read ({error}): define it in a .py file"
        ) from None


def _check_custom(folder: Path, kind: str) -> None:
    """Load the package in a process without earshard; if that fails, delete ``folder`` and raise UserError."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "-P", "-c", IMPORT_CHECK, str(folder)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder)
        reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise UserError(
            f"the projector {kind} cannot be exported: its source does not load without earshard ({reason}); it may "
            "import only installed packages, `train.Projector` and the modules of train.projectors"
        )


def load_projector(folder: str | Path, kind: str | None = None, lm: str | Path | None = None) -> Projector:
    """Load the projector of an export, in evaluation mode, float32 on the CPU; see :class:`train.Projector`.

    No code in ``folder`` is run.

    Args:
        folder: an export, as :func:`export` writes it.
        kind: import path ``my_module:MyProjector`` of the class, required for a custom projector. The class named in
            the export is never imported unless you pass it here.
        lm: the folder of the language model that will read the soft tokens, to be compared with ``lm.json``.

    Raises:
        UserError: the folder is not an export, has another format version, or is corrupt; or it holds a custom
            projector and ``kind`` is not given; or a file of ``lm`` is not that of the training, which is then named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from shards.format.spec import FeatureSpec
    from train.projectors import LayerMixer, MixedProjector, build_projector, embed_codes
    from train.projectors.ctc import HeadTokens
    from train.projectors.standalone import require_same_lm

    settings = read_settings(Path(folder))
    if lm is not None:
        try:
            require_same_lm(Path(folder), Path(lm))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from None
    config = settings.projector
    if isinstance(config, CustomConfig):
        if kind is None:
            raise UserError(
                f"'{folder}' holds a projector of the class {config.kind}, which is not part of earshard: pass "
                f"kind='{config.kind}' to import it from your Python path, or use the code in the folder as its "
                f"{MODEL_CARD} shows"
            )
        config = validate_config(CustomConfig, {"kind": kind, "settings": config.settings}, "kind")
    tokens = HeadTokens.placeholder(len(settings.tokens), settings.width)
    channels = settings.code_dim or settings.channels
    projector = build_projector(config, channels, settings.width, settings.embedding_rms, head_tokens=tokens)
    if settings.layers > 1:
        projector = MixedProjector(LayerMixer(settings.layers, settings.normalise_layers), projector)
    if settings.code_dim:
        spec = FeatureSpec.parse(settings.specs[0], f"'{folder}'")
        projector = embed_codes(projector, settings.channels, spec.codebook_size, settings.code_dim)
    weights = Path(folder) / WEIGHTS
    try:
        projector.load_state_dict(load_file(weights))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{weights}' cannot be loaded ({reason}): export the run again") from None
    return projector.eval()


def describe_export(folder: Path) -> Publication:
    """Return what a push of the export in ``folder`` would publish.

    Raises:
        UserError: ``folder`` is not an export.
    """
    from shards.share.transfer import ABSOLUTE_PATH

    tree = read_settings(folder).model_dump(mode="json")
    names = {"encoder": tree["encoder"], "lm": tree["lm"]["model"], "prompt.prompts": tree["prompt"]["prompts"]}
    paths = [f"{key} '{text}'" for key, text in names.items() if text and ABSOLUTE_PATH.match(text)]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return Publication(files, [("local paths", "; ".join(paths) or "none")])


def push_export(folder: Path, url: str, private: bool = False) -> None:
    """Publish the export in ``folder`` as the model ``hf://OWNER/NAME``.

    Raises:
        UserError: ``folder`` is not an export; or see :func:`shards.share.hub.push_model`.
    """
    from shards.share.hub import push_model

    read_settings(folder)
    push_model(folder, url, private)
