"""One tuning from start to end: alignment, attack and benign training all go through here."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from immunize.data.batches import Encoded, FixedBatches, Stream
from immunize.models import adapters
from immunize.models.loading import ChatModel
from immunize.seeding import derive
from immunize.training.budget import Spent
from immunize.training.checkpoints import Checkpoints
from immunize.training.context import Context
from immunize.training.defense import PostDefense
from immunize.training.method import Method
from immunize.training.tuning import LoRA, Trainable, Tuning

Roles = Mapping[str, "list[Encoded] | tuple[list[Encoded], list[Encoded]]"]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A post-stage defense, with the folders of the artifacts that it names."""

    method: PostDefense
    artifacts: Mapping[str, Path] = field(default_factory=dict)


def prepare_trainable(chat: ChatModel, trainable: Trainable, *, seed: int, adapter: Path | None = None) -> None:
    """Make `trainable` the set of weights that is trained.

    `adapter` is that of the defense, if it left one; the weights of `chat` already hold it.
    """
    if not isinstance(trainable, LoRA):
        adapters.merge(chat)
        chat.network.requires_grad_(True)
    elif trainable.adapter == "continued" and adapter is not None:
        adapters.continue_adapter(chat, adapter)
        chat.network.continued_adapter = True
    else:
        adapters.merge(chat)
        if trainable.quantized is not None:
            adapters.quantize(chat)
        adapters.attach(
            chat,
            rank=trainable.rank,
            alpha=trainable.alpha,
            dropout=trainable.dropout,
            targets=trainable.targets,
            seed=derive(seed, "adapter"),
        )


def make_streams(roles: Roles, *, batch_size: int, pad_id: int, seed: int, **parts: int) -> dict[str, Stream]:
    """One endless stream a role; a role given as a pair of lists yields paired batches.

    `parts` are the `micro_batches`, the `rank` and the `world_size` of every `Stream`.
    """
    streams = {}
    common: dict[str, Any] = {"batch_size": batch_size, "pad_id": pad_id, "seed": seed, **parts}
    for name, examples in roles.items():
        first, pairs = examples if isinstance(examples, tuple) else (examples, None)
        if not first:
            raise ValueError(f"data role {name!r} is empty; the split leaves nothing to train on")
        streams[name] = Stream(name=name, examples=first, pairs=pairs, **common)
    return streams


def tune(
    chat: ChatModel,
    method: Method,
    *,
    roles: Roles,
    tuning: Tuning,
    seed: int,
    adapter: Path | None = None,
    repairs: Sequence[Repair] = (),
    measure: Callable[[int, Spent], None] | None = None,
    measured_steps: Collection[int] = (),
    progress: Callable[[int], None] = lambda step: None,
    rank: int = 0,
    world_size: int = 1,
    checkpoints: Checkpoints | None = None,
    gradient_checkpointing: bool = False,
) -> Spent:
    """Tune `chat` in place by `method` and return what was spent.

    `roles` holds the encoded examples of every data role in `method.roles`, the first being the main one, and of those
    of `repairs`. `measure(step, spent)` is called after each of `measured_steps`, with the network in eval mode and
    repaired; the next step finds it as it was. After the last step it stays repaired.

    Of `world_size` processes in one process group (`parallel.joined`), this one being `rank`, each takes its part of
    every batch, and gradients are averaged, so that all end with the same weights; each counts what all of them spend.
    A repair is one process's affair, and is given to the first alone, as is `measure`.

    `checkpoints` hold the state from which a tuning that was killed goes on, to the bit. With `gradient_checkpointing`
    the layers' activations are computed again in the backward pass, which saves memory and costs a third more time.
    """
    micro_batches = tuning.shared_micro_batches(world_size)

    def make_context(user: Method, artifacts: Mapping[str, Path], **parts: int) -> Context:
        missing = [role for role in user.roles if role not in roles]
        if missing:
            raise ValueError(f"{type(user).__name__} needs the data roles {', '.join(missing)}, which are not given")
        chosen = {role: roles[role] for role in user.roles}
        streams = make_streams(chosen, batch_size=tuning.batch_size, pad_id=chat.pad_id, seed=seed, **parts)
        return Context(chat, streams=streams, seed=seed, steps=tuning.steps, artifacts=artifacts)

    context = make_context(method, {}, micro_batches=micro_batches, rank=rank, world_size=world_size)
    alone = tuning.micro_batches
    repairing = [(item.method, make_context(item.method, item.artifacts, micro_batches=alone)) for item in repairs]
    prepare_trainable(chat, tuning.trainable, seed=seed, adapter=adapter)

    def measure_repaired(step: int, spent: Spent) -> None:
        assert measure is not None
        with _repaired(repairing):
            measure(step, spent)

    if gradient_checkpointing:
        chat.network.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(derive(seed, "setup"))
    try:
        method.setup(context)
        for post, own in repairing:
            post.setup(own)
        spent = _fit(method, context, tuning, measure and measure_repaired, measured_steps, progress, checkpoints)
    finally:
        context.release()
    if gradient_checkpointing:
        chat.network.activation_checkpointing_disable()
    method.finish(context)
    chat.network.eval()
    for post, own in repairing:
        post.finish(own)
    return spent


@contextmanager
def _repaired(repairing: Sequence[tuple[PostDefense, Context]]) -> Iterator[None]:
    with ExitStack() as stack:
        for post, own in repairing:
            stack.enter_context(own.trial())
            post.finish(own)
        yield


def _fit(
    method: Method,
    context: Context,
    tuning: Tuning,
    measure: Callable[[int, Spent], None] | None,
    measured_steps: Collection[int],
    progress: Callable[[int], None],
    checkpoints: Checkpoints | None,
) -> Spent:
    from pytorch_lightning import Callback, Trainer
    from torch.utils.data import DataLoader, Subset

    from immunize.training.environment import Joined, OwnSignals
    from immunize.training.evaluation import Evaluation
    from immunize.training.module import TuneModule
    from immunize.training.saving import Saving

    device = context.chat.device
    module = TuneModule(method, context=context, tuning=tuning)
    if tuning.steps == 0:
        if measure is not None and 0 in measured_steps:
            context.network.eval()
            measure(0, module.spent)
        return module.spent

    saved = None if checkpoints is None else checkpoints.load()
    if saved is not None:
        module.resume(saved)

    class Progress(Callback):
        shown = module.first

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if context.step > self.shown:  # several micro-batches share one optimizer step
                self.shown = context.step
                progress(self.shown)

    stream = context.streams[method.roles[0]]
    accumulated = stream.micro_batches // stream.world_size
    callbacks: list[Callback] = [Progress(), *([OwnSignals()] if stream.world_size > 1 else [])]
    if measure is not None:
        callbacks.append(Evaluation(lambda step: measure(step, module.spent), steps=measured_steps))
    if checkpoints is not None:
        callbacks.append(Saving(checkpoints))
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        trainer = Trainer(
            accelerator="gpu" if context.chat.device.type == "cuda" else "cpu",
            devices=stream.world_size,
            strategy="auto" if stream.world_size == 1 else "ddp_find_unused_parameters_true",
            plugins=None if stream.world_size == 1 else [Joined(stream.rank)],
            use_distributed_sampler=False,
            accumulate_grad_batches=accumulated,
            max_steps=tuning.steps - module.first,
            max_epochs=1,
            gradient_clip_val=tuning.optimizer.clip,
            deterministic="warn" if device.type == "cuda" else False,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = FixedBatches(stream, steps=tuning.steps * accumulated)
        left = Subset(batches, range(module.first * accumulated, len(batches)))
        loader = DataLoader(left, batch_size=None)
        try:
            trainer.fit(module, loader)
        except SystemExit:  # Lightning turns ctrl-c into an exit of its own
            raise KeyboardInterrupt from None
    context.network.to(device)  # Lightning leaves it on the processor
    return module.spent
