"""The one LightningModule: automatic optimization around a method's five hooks."""

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from immunize.seeding import derive
from immunize.training.budget import Spent
from immunize.training.context import Context
from immunize.training.method import Method
from immunize.training.optimizers import make_optimizer
from immunize.training.tuning import Tuning


class _AttachGradients(torch.autograd.Function):
    """The loss itself, whose backward pass also hands each parameter a given gradient.

    So clipping, accumulation, loss scaling and data parallelism treat given gradients like computed ones.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (scale,) = outputs
        return scale, None, *(grad * scale for grad in ctx.grads)


class TuneModule(LightningModule):
    """Tunes `context.network` by `method`; counts what was spent."""

    def __init__(self, method: Method, *, context: Context, tuning: Tuning) -> None:
        super().__init__()
        self.method = method
        self.context = context
        self.tuning = tuning
        self.network = context.network
        self.spent = Spent(parameters=context.chat.parameters)
        self.first = 0  # the optimizer step that a resumed tuning starts with
        self._resumed: dict[str, Any] | None = None

    def resumable(self) -> dict[str, Any]:
        """What a tuning from here on needs beyond the seed: tensors and plain values."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        found = optimizer.state_dict()
        return {
            "context": self.context.resumable(),
            "optimizer": {name: value for name, value in found.items() if name != "param_groups"},
            "spent": {"steps": self.spent.steps, "examples": self.spent.examples, "tokens": self.spent.tokens},
        }

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Before the first step: go on from what `resumable` gave."""
        self.context.resume(saved["context"])
        self.first, self._resumed = self.context.step, dict(saved["optimizer"])
        for name, value in saved["spent"].items():
            setattr(self.spent, name, value)

    def configure_optimizers(self) -> Any:
        """The optimizer of the trainable set, the rate set anew before every optimizer step."""
        params = list(self.context.params().values())
        optimizer = make_optimizer(self.tuning.optimizer, params, rate=self.tuning.learning_rate)

        def factor(step: int) -> float:
            return self.tuning.optimizer.rate_factor(self.first + step, steps=self.tuning.steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if self._resumed is not None:
            groups = optimizer.state_dict()
            optimizer.load_state_dict({**groups, **self._resumed})
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        # Hugging Face models load in eval mode and Lightning leaves the mode alone: dropout would be off.
        self.network.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # No two micro-batches have the same masks.
        number = self._number(batch_idx) * self.trainer.world_size + self.global_rank
        torch.manual_seed(derive(self.context.seed, "noise", number))

    def _number(self, batch_idx: int) -> int:
        """Which micro-batch it is, counted from the first of the tuning, however often that was killed and resumed."""
        return self.first * self.trainer.accumulate_grad_batches + batch_idx

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.method.step(self.context, batch)
        if not torch.isfinite(out.loss):
            raise FloatingPointError(
                f"the loss became {out.loss.item()} at step {self.context.step + 1} of {self.tuning.steps} "
                f"(learning rate {self.tuning.learning_rate:g}); a lower rate or a bounded objective would help"
            )
        examples, tokens = self.context.streams[self.method.roles[0]].size(self._number(batch_idx))
        self.spent.add(examples=examples, tokens=tokens)
        if not out.grads:
            return out.loss
        params = self.context.params()
        return _AttachGradients.apply(out.loss, list(out.grads.values()), *(params[name] for name in out.grads))

    def on_after_backward(self) -> None:
        self.context.release()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.method.before_update(self.context)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Once an optimizer step: the micro-batches' closure, the update, and then the method's hook."""
        super().optimizer_step(*args, **kwargs)
        self.context.step += 1
        self.spent.steps += 1
        self.method.after_update(self.context)
