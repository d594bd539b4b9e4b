"""Three steps of the small net under a DeepSpeed configuration of launch/, and the losses as JSON: `zero_steps.py OUT CONFIG...`, on any launcher."""

import argparse
import json
import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from gidef.data import synthetic_blood_cells
from gidef.models import make_backbone


def losses(path: str) -> list[float]:
    with open(path) as file:
        chosen = json.load(file) | {"train_micro_batch_size_per_gpu": 8, "steps_per_print": 2**31}
    net = make_backbone("small", num_classes=8, image_shape=(3, 28, 28), small_stem=True, norm="group", pretrained=None, activation="leaky_relu", seed=0)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=chosen, dist_init_required=False)
    data, found = synthetic_blood_cells(train=16, val=8, test=8).train, []
    rows = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    for _ in range(3):
        loss = nn.functional.cross_entropy(engine(data.images[rows].float().div(255)), data.labels[rows])
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss := loss.detach().clone())
        found.append(float(loss) / dist.get_world_size())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)  # of deepspeed's launcher
    parser.add_argument("out")
    parser.add_argument("configurations", nargs="+")
    arguments = parser.parse_args()
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # no compiler is needed
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    told = {os.path.basename(path): losses(path) for path in arguments.configurations}
    if dist.get_rank() == 0:
        with open(arguments.out, "w") as file:
            json.dump(told, file)
    dist.destroy_process_group()
