"""Where experiments in lockstep meet: what each asks of the frozen language model is answered for all at once.

An experiment's step and its evaluation are the same functions as in a run alone. Each runs in a thread of its own, one
at a time; where it asks the language model, it waits, and the next one goes on. When all wait, their questions are
answered together (``train/sweeps/lm_batching.py``) and they go on in turn, so nothing here depends on the speed of a
thread.

```
job A: data -> projector -> ask ─┐                            ┌─> loss -> gradient -> optimizer
job B: data -> projector -> ask ─┴─> one pass of the LM ──────┴─> loss -> gradient -> optimizer
```

In: jobs that compute with a :func:`shared_lm`. Out: what each returned or raised. Torch's random numbers are put back
when a job goes on, so it draws what it would have drawn alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from train.lms.base import LanguageModel
from train.lms.layout import Ids
from train.sweeps.lm_batching import Answerer, Question

_here = threading.local()  # .job: the job whose thread this is


class _Abandoned(BaseException):
    """Ends a job whose question nobody will answer."""


class _Job:
    """A function in a thread of its own that runs only between :meth:`go_on` and its next question or its end."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.question: Question | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._answer: Any = None
        self._work = work
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def go_on(self, answer: Any = None) -> None:
        """Let the job run, with ``answer`` to its question; returns when it asks the next one or has ended."""
        self.question, self._answer = None, answer
        self._turn.release()
        self._back.acquire()

    def ask(self, question: Question) -> Any:
        """In the job's thread: wait for the answer."""
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
        self.question = question
        self._back.release()
        self._turn.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        torch.set_rng_state(random[0])
        if len(random) > 1:
            torch.cuda.set_rng_state_all(random[1:])
        answer, self._answer = self._answer, None
        return answer

    def _run(self) -> None:
        self._turn.acquire()
        _here.job = self
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        finally:
            self._back.release()


def meet(jobs: Mapping[str, Callable[[], Any]], answerer: Answerer) -> dict[str, Any]:
    """Run ``jobs`` to their ends; what each returned, or the exception that it raised, by name.

    Raises:
        Exception: whatever the language model itself raised; the jobs are ended.
    """
    running = {name: _Job(name, work) for name, work in jobs.items()}
    try:
        for job in running.values():
            job.go_on()
        while waiting := [job for job in running.values() if job.question is not None]:
            answers = answerer.answer([job.question for job in waiting if job.question is not None])
            for job, answer in zip(waiting, answers, strict=True):
                job.go_on(answer)
    finally:
        for job in running.values():
            if job.question is not None:
                job.go_on(_Abandoned())
    return {name: job.result if job.error is None else job.error for name, job in running.items()}


def shared_lm(lm: LanguageModel) -> LanguageModel:
    """``lm`` as one experiment of several sees it: what it asks inside :func:`meet` waits for the others.

    Outside of it, and for all else than nats and decoding, it is ``lm`` itself.
    """
    return cast("LanguageModel", _Shared(lm))


class _Shared(nn.Module):
    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.__dict__["_lm"] = lm  # no submodule: its weights are none of the experiment's

    def __getattr__(self, name: str) -> Any:
        """What a module does not have is the language model's."""
        return getattr(self.__dict__["_lm"], name)

    def target_nats(self, soft: Tensor, soft_mask: Tensor, before: Ids, after: Ids, targets: Ids) -> Tensor:
        job: _Job | None = getattr(_here, "job", None)
        if job is None:
            alone: Tensor = self._lm.target_nats(soft, soft_mask, before, after, targets)
            return alone
        gradient = torch.is_grad_enabled() and soft.requires_grad
        nats, slope = job.ask(Question(soft.detach(), soft_mask, before, after, targets, gradient=gradient))
        answered: Tensor = _Answered.apply(soft, nats, slope) if gradient else nats  # type: ignore[no-untyped-call]
        return answered

    def generate(
        self, soft: Tensor, soft_mask: Tensor, before: Ids, after: Ids, max_new_tokens: int
    ) -> list[list[int]]:
        job: _Job | None = getattr(_here, "job", None)
        ids: list[list[int]]
        if job is None:
            ids = self._lm.generate(soft, soft_mask, before, after, max_new_tokens)
        else:
            ids = job.ask(Question(soft, soft_mask, before, after, max_new_tokens=max_new_tokens))
        return ids


class _Answered(torch.autograd.Function):
    """Nats [B] whose gradient is known already: row b of soft [B, S, D] gets slope [B, S, D] times what flows to nats.

    Rows do not reach each other, so the gradient of each row's nats is all there is.
    """

    @staticmethod
    def forward(ctx: Any, soft: Tensor, nats: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return nats.clone()

    @staticmethod
    def backward(ctx: Any, *flowing: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (slope * flowing[0][:, None, None]).to(slope.dtype), None, None
