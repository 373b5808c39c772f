"""The device of ``pretended_cuda.py``: its tensors, streams and events, and the list of every wait for it.

Imports torch nowhere at its top: the library of that module must be loaded before.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PRODUCT = tuple(f"{ROOT}/{name}/" for name in ("pipeline", "train", "shards", "bench"))


class Wait(NamedTuple):
    """One wait of the host: its kind, and the innermost function of the product, such as ``train.model.ctc:loss``.

    ``via`` is the line of transformers that waits inside it, or "".
    """

    kind: str
    where: str
    via: str = ""


def _where() -> tuple[str, str]:
    """Return the innermost function of the product on the stack, and the line of transformers inside it."""
    frame: FrameType | None = sys._getframe(1)
    via = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PRODUCT):
            module = str(Path(name).relative_to(ROOT).with_suffix("")).replace("/", ".")
            return f"{module}:{frame.f_code.co_qualname}", via
        if not via and "/site-packages/transformers/" in name:
            via = f"{Path(name).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the product", via


class _Stream:
    """A stream: the copies that are not delivered yet, in order."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.copies: list[Callable[[], None]] = []

    def wait_event(self, event: _Event) -> None:
        self.copies += event.copies

    def wait_stream(self, stream: _Stream) -> None:
        self.copies += stream.copies

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _note("stream.synchronize")
        _deliver(self.copies)

    def query(self) -> bool:
        return True


class _Event:
    """An event: the copies that precede it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.copies: list[Callable[[], None]] = []

    def record(self, stream: _Stream | None = None) -> None:
        self.copies = list((stream or _current_stream()).copies)

    def wait(self, stream: _Stream | None = None) -> None:
        (stream or _current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _note("event.synchronize")
        _deliver(self.copies)

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: _Event) -> float:
        return 1.0


_default_stream = _Stream()
_local = threading.local()
_active: Any = None  # the device in use, in all threads


def _current_stream(device: Any = None) -> _Stream:
    stream: _Stream = getattr(_local, "stream", _default_stream)
    return stream


@contextmanager
def _use_stream(stream: _Stream | None) -> Iterator[None]:
    before = _current_stream()
    _local.stream = stream or before
    try:
        yield
    finally:
        _local.stream = before


def _deliver(copies: list[Callable[[], None]]) -> None:
    waiting, copies[:] = list(copies), []
    for copy in waiting:
        copy()


def _once(function: Callable[[], None]) -> Callable[[], None]:
    done: list[bool] = []

    def call() -> None:
        if not done:
            done.append(True)
            function()

    return call


def _note(kind: str) -> None:
    if _active is not None:
        _active.waits.append(Wait(kind, *_where()))


def _synchronize(device: Any = None) -> None:
    _note("torch.cuda.synchronize")
    _deliver(_current_stream().copies)


class _UseDevice:
    """Stands for ``torch.cuda.device``."""

    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> _UseDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _replace_cuda_queries(torch: Any) -> None:
    """Give ``torch.cuda`` one card with 80 GB, streams and events."""
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: _active is not None and _active.devices_set.append(str(device)),
        "synchronize": _synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (78 << 30, 80 << 30),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": lambda: [state],
        "set_rng_state_all": lambda states: None,
        "device": _UseDevice,
        "Stream": _Stream,
        "Event": _Event,
        "stream": _use_stream,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: _default_stream,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def make_device(torch: Any) -> type:
    from torch.optim.optimizer import _foreach_supported_types
    from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
    from torch.utils._pytree import tree_flatten, tree_map

    _replace_cuda_queries(torch)
    aten = torch.ops.aten

    class CudaTensor(torch.Tensor):  # type: ignore[misc,name-defined]
        @staticmethod
        def __new__(cls, host: Any, device: str = "cuda:0") -> Any:
            wrapper = torch.Tensor._make_wrapper_subclass(
                cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
                layout=host.layout, device=device, requires_grad=False,
            )  # fmt: skip
            wrapper._host = host
            return wrapper

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __repr__(self) -> str:
            return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

        def __tensor_flatten__(self) -> Any:
            return ["_host"], None

        @staticmethod
        def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Any:
            return CudaTensor(inner["_host"])

        def __deepcopy__(self, memo: Any) -> Any:
            return CudaTensor(self._host.clone()).requires_grad_(self.requires_grad)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return dispatch(func, args, kwargs or {})

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == torch.Tensor.data.__set__:
                mine, new = args
                if not isinstance(new, CudaTensor):
                    raise RuntimeError("incompatible tensor type: data of another device")
                with torch._C.DisableTorchFunctionSubclass():
                    func(*args)  # sizes and dtype
                mine._host = new._host
                return None
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            if func is torch.Tensor.tolist:
                _note("read tolist")
                return args[0]._host.tolist()
            if func is torch.Tensor.record_stream:
                return None
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    reads = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
    no_such_kernel = {  # of the CPU
        getattr(packet, name)
        for packet in (aten._use_cudnn_ctc_loss, aten._use_miopen_ctc_loss)
        for name in packet.overloads()
    }
    sized_by_values = {
        aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
        aten.repeat_interleave.Tensor, aten.bincount.default, aten.masked_scatter_backward.default,
    }  # fmt: skip
    indexing = {
        aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    }  # fmt: skip

    def on_cuda(tensor: Any) -> bool:
        return isinstance(tensor, CudaTensor)

    def host(tensor: Any) -> Any:
        return tensor._host if on_cuda(tensor) else tensor

    def is_pinned(tensor: Any) -> bool:
        return _active is not None and tensor.untyped_storage().data_ptr() in _active.pinned

    def pin(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        _active.pinned[storage.data_ptr()] = storage  # kept, so that no other memory gets this address
        return tensor

    def check_index(func: Any, args: Any) -> None:
        own, indices = args[0], [index for index in args[1] if index is not None]
        if not on_cuda(own):
            raise RuntimeError(f"{func}: a CPU tensor indexed by one on cuda")
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        puts = "index_put" in str(func)
        fills = puts and len(masks) == len(indices) == 1 and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        if masks and not fills:
            _note("boolean index")
        for _ in (index for index in indices if not on_cuda(index)):
            _note("H2D index")
        if puts and not on_cuda(args[2]) and args[2].dim():
            raise RuntimeError("expected the values of index_put_ on cuda")

    def copy(target: Any, source: Any, non_blocking: bool) -> None:
        """``target.copy_(source)`` with one of them on cuda; it waits unless both are contiguous and of equal dtype."""
        direct = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
        to_device, both = on_cuda(target), on_cuda(target) and on_cuda(source)
        late = both or (non_blocking and direct and is_pinned(source if to_device else target))
        if not late:
            _note(f"{'H2D' if to_device else 'D2H'} copy")
            _deliver(_current_stream().copies)
        if both or not late:
            host(target).copy_(host(source))
        elif to_device:
            kept = source.clone()
            target._host.copy_(kept)

            def check() -> None:
                if not torch.equal(kept.view(torch.uint8), source.contiguous().view(torch.uint8)):
                    raise RuntimeError("pinned memory was written while it was copied to the device")

            _current_stream().copies.append(_once(check))
        else:
            value = source._host.clone()
            target.view(torch.uint8).fill_(255)
            _current_stream().copies.append(_once(lambda: target.copy_(value)))

    def to_copy(source: Any, wanted: Any, kwargs: dict[str, Any]) -> Any:
        """``_to_copy`` between host and device."""
        dtype = kwargs.get("dtype") or source.dtype
        non_blocking = kwargs.get("non_blocking", False)
        if on_cuda(source):
            converted = source._host.to(dtype)
            if not non_blocking:
                _note(f"D2H {_short(source.dtype)}->{_short(dtype)}")
                _deliver(_current_stream().copies)
                return converted.clone()
            target = pin(torch.empty_like(converted))  # torch pins the result of a non-blocking copy to the host
            copy(target, CudaTensor(converted), True)
            return target
        late = non_blocking and is_pinned(source) and dtype == source.dtype and source.is_contiguous()
        if not late:
            _note(f"H2D {_short(dtype)}")
        target = CudaTensor(torch.empty_like(source, dtype=dtype))
        if late:
            copy(target, source, True)
        else:
            target._host.copy_(source)
        return target

    def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        device = kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        any_on_cuda = any(map(on_cuda, tensors))
        if func in no_such_kernel:
            return False
        if func is aten._pin_memory.default:
            return pin(args[0].clone())
        if func is aten.is_pinned.default:
            return is_pinned(args[0])
        if not any_on_cuda and not to_cuda:
            if not kwargs.pop("pin_memory", None):
                return func(*args, **kwargs)
            return pin(func(*args, **kwargs))
        if func is aten.copy_.default:
            copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
            return args[0]
        if func is aten._to_copy.default and device is not None and on_cuda(args[0]) != to_cuda:
            return to_copy(args[0], device, kwargs)
        if func in reads:
            _note(f"read {func.__name__.split('.')[0].removeprefix('_')}")
        elif func in sized_by_values and any_on_cuda:
            _note(func.__name__.split(".")[0])
        elif func in indexing:
            check_index(func, args)
        elif any_on_cuda:
            strangers = [each for each in tensors if not on_cuda(each) and each.dim()]
            if strangers:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({func}, {tuple(strangers[0].shape)})"
                )
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type == "cpu":
                raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        host_kwargs = tree_map(host, dict(kwargs))
        if device is not None:
            host_kwargs["device"] = "cpu"
        host_kwargs.pop("pin_memory", None)
        out = func(*tree_map(host, args), **host_kwargs)
        if not (to_cuda if device is not None else any_on_cuda):
            return out
        if isinstance(out, torch.Tensor):
            for i, argument in enumerate(func._schema.arguments):  # in place: return the very wrapper
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[i] if i < len(args) else kwargs.get(argument.name)
                    if on_cuda(written) and written._host is out:
                        return written
        return tree_map(lambda each: CudaTensor(each) if isinstance(each, torch.Tensor) else each, out)

    class Device(TorchDispatchMode):
        """The device; within ``with`` it is what torch calls ``cuda``.

        Attributes:
            waits: every wait so far.
            devices_set: what ``torch.cuda.set_device`` was called with.
            pinned: storages of pinned memory, by address.
        """

        def __init__(self) -> None:
            super().__init__()
            self.waits: list[Wait] = []
            self.devices_set: list[str] = []
            self.pinned: dict[int, Any] = {}

        def __enter__(self) -> Any:
            global _active
            _active = self
            # views of wrappers have no place in inference mode
            self._inference_mode, torch.inference_mode = torch.inference_mode, lambda mode=True: torch.no_grad()
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=cuda) is made on the CPU, then copied
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            global _active
            _active = None
            torch._C._set_only_lift_cpu_tensors(False)
            torch.inference_mode = self._inference_mode
            return super().__exit__(*error)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return dispatch(func, args, dict(kwargs or {}))

    plain_run = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        if _active is None:
            return plain_run(thread)
        _push_mode(_active)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            return plain_run(thread)
        finally:
            _pop_mode()

    threading.Thread.run = run  # type: ignore[method-assign]
    _foreach_supported_types.append(CudaTensor)
    _let_safetensors_save(host)
    return Device


def _let_safetensors_save(host: Callable[[Any], Any]) -> None:
    """safetensors reads the memory of tensors directly: hand it the CPU tensors."""
    import safetensors.torch

    plain = safetensors.torch.save_file

    def save_file(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        return plain({name: host(each).detach().contiguous() for name, each in tensors.items()}, *args, **kwargs)

    safetensors.torch.save_file = save_file


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
