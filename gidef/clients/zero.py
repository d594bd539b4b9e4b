"""One client on several ranks under DeepSpeed's ZeRO, in the place of FSDP2 (see clients.sharded)."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gidef.clients.local import LocalSettings, torch_optimiser
from gidef.clients.sharded import Group, Layout
from gidef.errors import InputError
from gidef.types import Tensors

BUCKET = 2**24
"""Entries that are reduced or fetched at a time; DeepSpeed's own default holds 2 GiB of buffers."""


class Zero:
    """DeepSpeed's engine over a group of ranks: stage 0 cuts nothing, 1 the optimiser's state, 2 the gradients as well, 3 the parameters as well.

    It is made once and reset for every client: weights are written, the optimiser's state is dropped. Its optimiser is torch's, so nothing is compiled.

    Args: model: is changed in place.  settings: a step's; no accumulation, no FedProx (refused by config.problems).  process_group: torch's, of
          the group.  offload: keep the optimiser's state in main memory and step there.
    Raises: InputError if DeepSpeed is not installed.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, group: Group, settings: LocalSettings, *, process_group: Any, device: torch.device, stage: int, offload: bool
    ) -> None:
        deepspeed = _imported(device)
        self._module, self._layout, self._stage, self._group = model, layout, stage, group
        trained = [p for p in model.parameters() if p.requires_grad]
        self._step = torch_optimiser(settings, trained)
        zero = {
            "stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 0, "overlap_comm": False,
        }  # fmt: skip
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        chosen = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": settings.grad_clip,
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**31,
        }  # fmt: skip
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it asks for the device's number in this form, which srun alone does not give
        self._engine, self._optimiser, *_ = deepspeed.initialize(
            model=model, optimizer=self._step, model_parameters=trained, config=chosen, dist_init_required=False, mpu=_Axis(group, process_group)
        )
        self._gathered = deepspeed.zero.GatheredParameters
        self.model = _Called(self._engine, model)

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        for name, value in self._layout.whole(tensors).items():
            p = self._module.get_parameter(name)
            if self._stage < 3:
                p.copy_(value)
                continue
            with self._gathered([p], modifier_rank=0):
                p.copy_(value)
        if hasattr(self._optimiser, "refresh_fp32_params"):  # ZeRO steps on copies of its own
            self._optimiser.refresh_fp32_params()

    def begin(self, settings: LocalSettings) -> None:
        self._step.state.clear()
        self._optimiser.zero_grad()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, count: int, shift: Tensors | None) -> None:
        if count != 1 or shift is not None:
            raise ValueError("DeepSpeed's step takes one backward pass and no correction")
        self._engine.step()

    @torch.no_grad()
    def slices(self) -> Tensors:
        found = {}
        for name, p in self._module.named_parameters():
            if self._stage < 3:
                found |= self._layout.slices({name: p})
                continue
            with self._gathered([p]):
                found |= self._layout.slices({name: p.data})
        return found


class _Called:
    """The module, called through the engine."""

    def __init__(self, engine: Any, module: nn.Module) -> None:
        self._engine, self._module = engine, module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._engine(*inputs, **options)

    def run(self, images: Tensor, noise: Tensor | None = None) -> Any:
        return self._engine(images, noise, full=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Axis:
    """What DeepSpeed asks of a model-parallel unit: its data-parallel ranks are the group's."""

    def __init__(self, group: Group, process_group: Any) -> None:
        self._group, self._process_group = group, process_group
        backend = dist.get_backend(process_group)  # a group of its own: where DeepSpeed finds None, it sums norms over the whole run
        self._alone = dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)

    def get_data_parallel_group(self) -> Any:
        return self._process_group

    def get_data_parallel_rank(self) -> int:
        return self._group.rank

    def get_data_parallel_world_size(self) -> int:
        return self._group.size

    def get_model_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _imported(device: torch.device) -> Any:
    """DeepSpeed, joined to the run's ranks."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise InputError('speed.shard_backend=deepspeed needs DeepSpeed, which is not installed: pip install -e ".[deepspeed]", or take fsdp2.') from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # of calls that DeepSpeed makes, at every one
    if device.type == "cpu":
        # Its collective over shared memory would be compiled for a minute, by a lock that hangs all later runs if this one is killed; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    return deepspeed
