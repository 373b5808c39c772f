"""An export as a model of transformers: audio -> encoder -> projector -> language model -> text.

    from transformers import AutoModel
    model = AutoModel.from_pretrained("EXPORT", trust_remote_code=True)
    print(model.transcribe("speech.wav"))

or, as a pipeline of transformers,

    asr = pipeline("automatic-speech-recognition", model="EXPORT", trust_remote_code=True)
    print(asr("speech.wav")["text"])

This is the code that ``python -m train transcribe`` runs, so on the same CPU and libraries it computes the same bits.
Encoder and language model are not part of the export: they are loaded from the references that it names, if these are
on a hub, or from ``encoder=`` and ``lm=``. Others than those of the training are refused. What ``config.json`` names is
never a path: a folder is read only if the caller passes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Pipeline, PreTrainedConfig, PreTrainedModel

from pipeline.audio import SAMPLING_RATE, decode, resample, to_mono
from pipeline.encoders.recording import open_encoder
from pipeline.weights.resolve import resolve_weights
from shards.errors import UserError
from train.config.model import INSTRUCTION
from train.data.instructions import Instructions
from train.data.live import encode_features
from train.data.padding import pad
from train.distributed.device import choose_device, choose_dtype
from train.inference.receiver.projector_class import ProjectorClass
from train.lms.hf.adapters import PACKAGES
from train.lms.hf.model import HfLanguageModel, hash_weights, load_hf
from train.model.audio_lm import AudioLM
from train.model.prompt import Prompt, PromptRow
from train.model.replay import require_same_ids
from train.projectors.standalone import load, require_same_lm

HUBS = ("hf:", "modelscope:")


@dataclass(frozen=True)
class Recording:  # transformers would make a plain tuple of a named one
    """Mono float32 [samples] and their sampling rate in Hz."""

    samples: npt.NDArray[np.float32]
    sampling_rate: int


Audio = str | Path | bytes | npt.NDArray[np.float32] | Recording


class EarshardConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What transformers itself reads of ``config.json``; :class:`EarshardModel` reads the rest."""

    model_type = "earshard"

    def __init__(self, **keys: Any) -> None:
        own = ("architectures", "auto_map", "custom_pipelines", "_name_or_path", "_commit_hash")
        super().__init__(**{key: value for key, value in keys.items() if key in own})


class EarshardModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The model of an export. Its weights are read where it is loaded, and it is not saved."""

    config_class = EarshardConfig

    def __init__(self, config: EarshardConfig, audio_lm: AudioLM, encoder: Any, settings: dict[str, Any]) -> None:
        super().__init__(config)
        self.audio_lm, self.encoder, self.settings = audio_lm, encoder, settings
        self.specs = [SimpleNamespace(**{"margin": 0.0, **spec}) for spec in settings["specs"]]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        encoder: str | Path | None = None,
        lm: str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> EarshardModel:
        """Load the export, its encoder and its language model.

        Args:
            pretrained_model_name_or_path: folder of the export, or its name on the Hugging Face hub.
            model_args: not used.
            config: an :class:`EarshardConfig`; None: that of the export.
            encoder: folder or name on the hub of the encoder; None: the one that the export names.
            lm: folder or name on the hub of the language model; None: the one that the export names.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: of the language model and the activations; ``auto``: as ``transcribe`` chooses for the run.
            options: ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` are for the hub.

        Raises:
            ValueError: encoder or language model is missing, or is not that of the training.
        """
        folder = _export_folder(str(pretrained_model_name_or_path), getattr(config, "_commit_hash", None), options)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        place = choose_device(device)
        precision = dtype if isinstance(dtype, torch.dtype) else choose_dtype(_dtype_name(dtype, settings), place)
        try:
            spec: Any = SimpleNamespace(**{"margin": 0.0, **settings["specs"][0]})
            found = open_encoder(spec, _reference(encoder, settings["encoder"], "encoder"), device)
            audio_lm = _load_audio_lm(folder, settings, lm, place, precision)
        except UserError as error:
            raise ValueError(str(error).replace("with --encoder", "as encoder=")) from None
        return cls(config or EarshardConfig(), audio_lm.to(place).eval(), found, settings)

    @torch.no_grad()
    def soft_tokens(self, audio: Audio) -> Tensor:
        """Return the soft tokens of ``audio``, [S, D]; see :meth:`transcribe`."""
        features, mask = pad([self._features(audio)])
        soft, soft_mask = self.audio_lm.soft_tokens(features, mask)
        return soft[0, soft_mask[0].to(soft.device)]

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, T, C] and their mask to soft tokens [B, S, D] and their mask, without the encoder."""
        return self.audio_lm.soft_tokens(features, mask)

    @torch.no_grad()
    def transcribe(
        self, audio: Audio | Sequence[Audio], instruction: str = "", max_new_tokens: int | None = None
    ) -> Any:
        """Return the text of ``audio`` as one line, or a list of texts for a list.

        Args:
            audio: path or bytes of an audio file, float32 [samples], mono at 16 kHz, or a :class:`Recording`; or a list
                of these, as one batch.
            instruction: replaces the instruction of the prompt; "": as in an evaluation of the run.
            max_new_tokens: None: that of the run.
        """
        template = self.settings["prompt"]["template"]
        if instruction and not (template in ("slam", "chat") or INSTRUCTION in template):
            raise ValueError("the prompt of this export has no place for an instruction: leave out instruction=")
        single = isinstance(audio, str | Path | bytes | np.ndarray | Recording)
        clips: list[Audio] = [audio] if single else list(audio)  # type: ignore[list-item, arg-type]
        features, mask = pad([self._features(each) for each in clips])
        names = [str(each) if isinstance(each, str | Path) else "" for each in clips]
        rows = [PromptRow(name, prompt=instruction) for name in names]
        count = max_new_tokens or self.settings["inference"]["max_new_tokens"]
        texts = [" ".join(text.split()) for text in self.audio_lm.generate(features, mask, count, rows=rows)]
        return texts[0] if single else texts

    def _features(self, audio: Audio) -> npt.NDArray[Any]:
        rate = self.encoder.sampling_rate
        if isinstance(audio, np.ndarray):
            audio = Recording(audio, SAMPLING_RATE)
        if isinstance(audio, Recording):
            samples = (
                audio.samples if audio.sampling_rate == rate else resample(audio.samples, audio.sampling_rate, rate)
            )
        else:
            samples = decode(audio if isinstance(audio, bytes) else Path(audio).read_bytes(), rate=rate)
        specs: Any = self.specs
        return encode_features(samples, self.encoder, specs)


class EarshardPipeline(Pipeline):
    """The pipeline "automatic-speech-recognition" of an export: audio to ``{"text": text}``.

    Audio is a path, the bytes of an audio file, samples at 16 kHz, or ``{"raw": samples, "sampling_rate": Hz}``, for
    which ``datasets`` writes ``array``. Samples are floats in [-1, 1], [T] or [channels, T]. A list gives a list, a
    dataset or a generator an iterator. ``batch_size`` is 8, that of ``transcribe``.
    """

    model: Any
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, model: EarshardModel, *, device: Any = None, batch_size: int = 8, **options: Any) -> None:
        place = model.device
        super().__init__(model, device=place if device is None else device, batch_size=batch_size, **options)
        if (self.device.type, self.device.index or 0) != (place.type, place.index or 0):
            raise ValueError(
                f"the encoder of this export was loaded on {place}, and its dtype was chosen for that device: in place "
                f"of device=, pass model_kwargs={{'device': '{self.device}'}}"
            )

    def _sanitize_parameters(  # type: ignore[override]
        self,
        instruction: str = "",
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        given = {"instruction": instruction, "max_new_tokens": max_new_tokens}
        if generate_kwargs:
            return self._sanitize_parameters(**{**given, **generate_kwargs})
        return {}, {name: value for name, value in given.items() if value}, {}

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, str]]:
        """Yield the results of ``inputs``; a batch is padded as ``transcribe`` pads it."""
        indexed: Any = inputs
        clips = iter(indexed[i] for i in range(len(indexed))) if isinstance(inputs, Sized) else iter(inputs)
        while batch := list(islice(clips, batch_size)):
            for text in self.model.transcribe([self.preprocess(each) for each in batch], **forward_params):
                yield {"text": text}

    def preprocess(self, input_: Any, **_: Any) -> Any:
        """Return what :meth:`EarshardModel.transcribe` takes."""
        if isinstance(input_, str | Path | bytes):
            return input_
        rate, samples = 16_000, input_
        if isinstance(input_, dict):
            samples = input_.get("raw", input_.get("array"))
            if samples is None or "sampling_rate" not in input_:
                raise ValueError('a dict must have "raw" or "array", and "sampling_rate"')
            rate = int(input_["sampling_rate"])
        samples = np.asarray(samples)
        if samples.dtype.kind != "f" or samples.ndim not in (1, 2) or (samples.ndim == 2 and len(samples) > 2):
            raise ValueError(
                f"expected floats in [-1, 1], [samples] or [channels, samples] with one or two channels, got "
                f"{samples.dtype} {list(samples.shape)}"
            )
        own = self.model.encoder.sampling_rate  # what it is resampled to, once
        return Recording(to_mono(np.atleast_2d(samples.astype(np.float32)).T, rate, own), own)

    def _forward(self, input_tensors: Any, **forward_parameters: Any) -> Any:
        return self.model.transcribe(input_tensors, **forward_parameters)

    def postprocess(self, model_outputs: Any, **_: Any) -> dict[str, str]:
        """Return the text as other speech pipelines do."""
        return {"text": model_outputs}


def _export_folder(name: str, commit: str | None, options: dict[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    known = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if options.get(key) is not None}
    return Path(snapshot_download(name, revision=commit or options.get("revision"), **known))


def _dtype_name(dtype: str, settings: dict[str, Any]) -> str:
    return str(settings["inference"]["dtype"]) if dtype == "auto" else dtype


def _reference(given: str | Path | None, recorded: str | None, role: str) -> str:
    """Return the reference of encoder or LM: the caller's, or the recorded one if it is on a hub."""
    if given is None:
        if recorded and recorded.startswith(HUBS):
            return recorded
        raise ValueError(
            f"the {role} of this export is on no hub (recorded: {recorded}): pass {role}= its folder, or its name on "
            "the hub"
        )
    text = str(given)
    if Path(text).is_dir():
        return f"path:{text}"
    return text if text.startswith((*HUBS, "path:")) else f"hf:{text}"


def _load_audio_lm(
    folder: Path, settings: dict[str, Any], lm: str | Path | None, device: torch.device, dtype: torch.dtype
) -> AudioLM:
    config, inference = settings["lm"], settings["inference"]
    missing = [name for key, needed in PACKAGES.items() if config[key] for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"the language model of this export needs {' '.join(missing)}: install it with pip")
    reference = _reference(lm, config["model"], "lm")
    lm_folder = resolve_weights(reference, role="lm").folder
    require_same_lm(folder, lm_folder)
    options = _namespace({**config, "compile": False, "gradient_checkpointing": False})
    model = load_hf(
        lm_folder,
        reference=reference,
        identity=hash_weights(lm_folder),
        device=device,
        dtype=dtype,
        train=config["train"],
        options=options,
    )
    _restore_trained(model, folder / "lm.safetensors")
    record = json.loads((folder / "lm.json").read_text(encoding="utf-8"))
    model.tokenizer.now = datetime.fromisoformat(record["date"])
    instructions = Instructions(settings["instructions"]) if settings["instructions"] else None
    seeds = inference["order_seed"], inference["val_seed"]
    prompt = Prompt(_namespace(settings["prompt"]), model.tokenizer, instructions, *seeds)
    require_same_ids(model, prompt, record, folder)
    projector: Any = load(folder, projector_class=ProjectorClass)
    decoding = _namespace(inference["decode"])
    head = projector.ctc_head() if decoding.ctc_weight else None
    classes: Any = SimpleNamespace(tokens=settings["tokens"])
    return AudioLM(projector, model, prompt, head, classes, decoding)


def _restore_trained(model: HfLanguageModel, path: Path) -> None:
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    stored = load_file(path) if path.is_file() else {}
    if trained.keys() != stored.keys():
        raise ValueError(f"'{path}' does not hold the trained parameters of the language model: export the run again")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def _namespace(tree: dict[str, Any]) -> Any:
    return json.loads(json.dumps(tree), object_hook=lambda found: SimpleNamespace(**found))
