"""Undefended nets beside figures that the literature reports, of one case each (mean PSNR): do these attacks keep their published order?

    row                    published                                                      here
    DLG                    23.4 dB: small ConvNet, CIFAR-10, batch 1                      DLG's own LeNet with sigmoids and its own search of images and labels
    R-GAP                  49.0 dB: cnn6, CIFAR-10, batch 1                               cnn6 in closed form
    Inverting Gradients    20.8 dB: ResNet-18, FedAvg of 4 images                         ResNet-18, BatchNorm in eval mode, a delta of 4 steps of one image each
    hundred images         11.2 dB: 100 CIFAR-100 images in one gradient                  100 CIFAR-10 images in one gradient of the small net
    imprint                47.1 dB: Robbing the Fed, ImageNet                             64 CIFAR-10 images behind an imprint block of 512 bins

On 5,000 CIFAR-10 images, one seed: R-GAP 100 dB (8 images; 100 is the cap), imprint 83.5 (64), DLG 46.6 [38.0, 53.9] (8), Inverting Gradients 21.2 (4; a class mean has 12.7), a hundred
images 11.6, below even what a class mean has (13.3): the published order, with DLG far above its figure. On the small net, of ReLUs and norms, DLG has 16.5 dB [15.9, 17.3].
Rows of one observation have no interval.

ResNet-18's residual branches are started as torchvision starts them. As timm does, at nought, and with GroupNorm, the same attack has 10.9 dB: hardly a gradient then depends on the image, which is
no defence: training takes the branches away from there.

Shows:  each case as near to the published one as these nets and images come; --small takes the small net for ResNet-18, and shorter searches.
Expect: R-GAP and imprint far above the others, a hundred images in one gradient last, near what an average image has.
Costs:  an hour and a half of one CPU core, all but a quarter of an hour of it ResNet-18; --small: a quarter of an hour. CIFAR-10 must be in GIDEF_DATA, or be downloaded.
"""

from dataclasses import replace

import torch
from torch import nn

from gidef.config import Analytic, Data, DeepLeakage, Evaluation, ImprintServer, InvertingGradients, LocalTraining, Model, Recipe, Rounds, Undefended
from gidef.main import sweep


def cnn6(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The six convolutions of Zhu and Blaschko 2021, arXiv:2010.07733, without biases."""
    layers: list[nn.Module] = []
    before, side = image_shape[0], image_shape[1]
    for width, kernel, stride, padding in ((12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)):
        layers += [nn.Conv2d(before, width, kernel, stride, padding, bias=False), nn.LeakyReLU(0.2)]
        before, side = width, (side + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, num_classes, bias=False))


def lenet_sigmoid(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """DLG's net (Zhu, Liu and Han 2019): three convolutions of 12 channels, sigmoids, all parameters drawn from [-0.5, 0.5)."""
    layers: list[nn.Module] = []
    before, side = image_shape[0], image_shape[1]
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(before, 12, 5, stride, 2), nn.Sigmoid()]
        before, side = 12, (side - 1) // stride + 1
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, num_classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.5, 0.5)
    return net


RECIPE = Recipe(
    data=Data(name="cifar10", num_clients=10),
    model=Model(name="small", cut="blocks.1"),
    clients=LocalTraining(epochs=1, batch_size=64, optimiser="adam", lr=1e-3),
    rounds=Rounds(count=1, cohort_size=1),
    defences={"undefended": Undefended()},
    attacks={},
    evaluation=Evaluation(num_victims=8, num_tuning=0, checkpoints=("untrained",), judge_epochs=1),
)
FOUR = replace(RECIPE.evaluation, num_victims=4, batch_size=4, release="delta", local_steps=4, local_lr=1e-4)
HUNDRED = replace(RECIPE.evaluation, num_victims=100, batch_size=100)
SIXTY_FOUR = replace(RECIPE.evaluation, num_victims=64, batch_size=64)
RESNET = Model(name="resnet18", cut="layer1", norm="frozen", options={"zero_init_last": False})
FEW = replace(RECIPE.evaluation, num_victims=2)
ROWS = {
    "DLG": replace(RECIPE, model=Model(name="published:lenet_sigmoid", cut="1"), attacks={"DLG": DeepLeakage()}),
    "R-GAP": replace(RECIPE, model=Model(name="published:cnn6", cut="1"), attacks={"R-GAP": Analytic()}),
    "Inverting Gradients": replace(RECIPE, model=RESNET, attacks={"Inverting Gradients": InvertingGradients(iterations=2000)}, evaluation=FOUR),
    "hundred images": replace(RECIPE, attacks={"Inverting Gradients": InvertingGradients()}, evaluation=HUNDRED),
    "imprint": replace(RECIPE, attacks={"imprint": ImprintServer(bins=512)}, evaluation=SIXTY_FOUR),
}
SMALL = {
    "DLG": replace(ROWS["DLG"], attacks={"DLG": DeepLeakage(iterations=60)}, evaluation=FEW),
    "R-GAP": replace(ROWS["R-GAP"], evaluation=FEW),
    "Inverting Gradients": replace(RECIPE, attacks={"Inverting Gradients": InvertingGradients(iterations=400)}, evaluation=FOUR),
    "hundred images": replace(ROWS["hundred images"], attacks={"Inverting Gradients": InvertingGradients(iterations=200)}),
    "imprint": ROWS["imprint"],
}

sweep(ROWS, small=SMALL)
