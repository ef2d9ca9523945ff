"""What a method may do to a network while it is being tuned; every trick lives here, so that methods stay formulas."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from immunize.data.batches import Batch, Stream
from immunize.models.loading import ChatModel, load_folder
from immunize.models.predictions import Predictions, hidden_states, predict
from immunize.seeding import derive
from immunize.training import losses
from immunize.training.sites import SiteKind, primary, replace_primary, sites
from immunize.training.weights import Weights


class Context(Weights):
    """The network under tuning, its data streams, and the primitives of every method.

    `step` counts optimizer steps; `state` is the method's own memory.
    """

    def __init__(
        self,
        chat: ChatModel,
        *,
        streams: Mapping[str, Stream],
        seed: int,
        steps: int,
        artifacts: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__(chat)
        self.streams = dict(streams)
        self.seed = seed
        self.steps = steps
        self.step = 0
        self.state = SimpleNamespace()
        self._drawn = dict.fromkeys(self.streams, 0)
        self._kept = ExitStack()
        self._reference: nn.Module | None = None
        self._artifacts = dict(artifacts or {})

    # A tuning that goes on

    def resumable(self) -> dict[str, Any]:
        """What has moved since `setup`: trainable weights, what was drawn, and the method's own memory."""
        weights = {name: parameter.detach() for name, parameter in self.params().items()}
        return {"step": self.step, "drawn": dict(self._drawn), "state": vars(self.state), "weights": weights}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """After `setup`, go on from what `resumable` gave."""
        self.step = saved["step"]
        self._drawn.update(saved["drawn"])
        self.state = SimpleNamespace(**_moved(saved["state"], self.chat.device))
        self.restore(saved["weights"])

    # Data and randomness

    def draw(self, role: str) -> Any:
        """The next (micro-)batch of an auxiliary role; the stream never ends."""
        number = self._drawn[role]
        self._drawn[role] += 1
        return self.streams[role].batch(number).to(self.chat.device)

    def draw_rows(self, role: str, count: int) -> Any:
        """The next `count` examples of an auxiliary role, of which any number may be asked for.

        They come in the stream's order, each once an epoch. A role is drawn by batches or by rows, never by both.
        """
        start = self._drawn[role]
        self._drawn[role] += count
        return self.streams[role].rows(start, count).to(self.chat.device)

    def normal_like(self, tensor: Tensor, name: str) -> Tensor:
        """Standard normal noise that depends on seed, step and name alone, so that micro-batches share it."""
        generator = torch.Generator(device="cpu").manual_seed(derive(self.seed, "noise", self.step, name))
        noise = torch.randn(tensor.shape, generator=generator)
        return noise.to(device=tensor.device, dtype=tensor.dtype)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Inside, `write`, `edit` and `draw` are on trial: afterwards every weight and stream is where it was."""
        drawn = dict(self._drawn)
        try:
            with self.undone():
                yield
        finally:
            self._drawn = drawn

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is in eval mode and builds no graph."""
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.network.train(training)

    @contextmanager
    def same_rng(self) -> Iterator[None]:
        """Leave the random state as it was found, so that what follows meets the same dropout masks."""
        devices = [self.chat.device] if self.chat.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    # Losses

    def forward(self, batch: Batch, *, hidden_states: bool = False) -> Any:
        """Run the network. With padding on the right, causal attention needs no mask: no label looks at padding."""
        return self.network(input_ids=batch.input_ids, output_hidden_states=hidden_states, use_cache=False)

    def predict(self, batch: Batch, *, hidden_states: bool = False) -> Predictions:
        """The predictions of the labelled tokens, for the losses of `immunize.training.losses`."""
        return predict(self.network, batch.input_ids, batch.labels, hidden_states=hidden_states)

    def hidden_states(self, batch: Batch) -> Sequence[Tensor]:
        """At all depths, the embedding first, each (batch, time, hidden); nothing is decoded."""
        return hidden_states(self.network, batch.input_ids)

    def ce(self, batch: Any, *, weights: Tensor | None = None) -> Tensor:
        """Token-mean cross-entropy of the answers (nats), over the whole batch.

        `weights` (batch, time), aligned with the labels, makes it a weighted mean.
        """
        return losses.cross_entropy(self.predict(batch), None if weights is None else weights[:, 1:])

    # Activations

    def sites(self, kind: SiteKind) -> dict[str, nn.Module]:
        """One module a layer: `attention`, `mlp` or `residual`."""
        return sites(self.network, kind)

    @contextmanager
    def taps(self, kind: SiteKind, *, reference: bool = False) -> Iterator[dict[str, Tensor]]:
        """Inside, a forward pass fills the dictionary with the activations at each site: (batch, time, hidden).

        Where `reference` is true, a pass of the network as it was before does, and the sites have the same names.
        """
        seen: dict[str, Tensor] = {}
        kept = self._reference if reference else None

        def record(name: str) -> Callable[..., None]:
            return lambda module, args, output: seen.__setitem__(name, primary(output))

        with _hooks(self.sites(kind) if kept is None else sites(kept, kind), record):
            yield seen

    @contextmanager
    def inject(self, shifts: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `shifts` are added to the activations of the sites they are named after.

        With activation checkpointing the backward pass runs the layers again: enter through `keep`.
        """

        def shift(name: str) -> Callable[..., Any]:
            return lambda module, args, output: replace_primary(output, primary(output) + shifts[name])

        modules = dict(self.network.named_modules())
        with _hooks({name: modules[name] for name in shifts}, shift):
            yield

    def eps_grad(self, kind: SiteKind, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Gradient of `loss()` with respect to the activations at each site.

        A zero leaf is added at each site and differentiated: captured activations have no graph below frozen layers.
        """
        leaves: dict[str, Tensor] = {}

        def add_leaf(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = primary(output)
                if name not in leaves:  # one leaf a site, also when `loss` passes through it twice
                    leaves[name] = torch.zeros_like(hidden, requires_grad=True)
                return replace_primary(output, hidden + leaves[name])

            return hook

        with _hooks(self.sites(kind), add_leaf):
            value = loss()
            grads = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def keep(self, manager: AbstractContextManager[Any]) -> Any:
        """Enter `manager` and leave it only after the backward pass (or when the tuning fails)."""
        return self._kept.enter_context(manager)

    def release(self) -> None:
        """Leave everything that was kept; the engine calls it after each backward pass."""
        self._kept.close()

    # Other models

    def artifact(self, name: str) -> dict[str, Tensor]:
        """The weights of an artifact that the method names, in float32, on the network's device."""
        network = load_folder(self._artifacts[name] / "weights", dtype="float32", device=str(self.chat.device)).network
        return {name: weight.detach() for name, weight in network.named_parameters()}

    def keep_reference(self) -> None:
        """In `setup`, by a method that will ask for what was before: keeps a copy, unless there is a fresh adapter."""
        assert self.step == 0, "what was before must first be asked for in setup, while the weights have not moved"
        if self._reference is None and not self._can_switch_off:
            self._reference = copy.deepcopy(self.network).eval().requires_grad_(False)

    def hidden_states_before(self, batch: Batch) -> Sequence[Tensor]:
        """`hidden_states` of the network as it was before the first step, in eval mode and without a graph.

        A fresh adapter is switched off; otherwise a copy is kept, which must first be asked for in `setup`.
        """
        with self._before() as network:
            return hidden_states(network, batch.input_ids)

    def predict_before(self, batch: Batch) -> Predictions:
        """The predictions of the network as it was, likewise."""
        with self._before() as network:
            return predict(network, batch.input_ids, batch.labels)

    @contextmanager
    def _before(self) -> Iterator[Any]:
        if self._can_switch_off:
            with self.evaluating(), self.network.disable_adapter():
                yield self.network
            return
        if self._reference is None:
            self.keep_reference()
        with torch.no_grad():
            yield self._reference

    @property
    def _can_switch_off(self) -> bool:
        return hasattr(self.network, "disable_adapter") and not _is_continued(self.chat)


def _moved(value: Any, device: torch.device) -> Any:
    """The same value with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _is_continued(chat: ChatModel) -> bool:
    return getattr(chat.network, "continued_adapter", False)


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(make(name)).remove)
        yield
