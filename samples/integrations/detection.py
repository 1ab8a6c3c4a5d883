"""Detection: torchvision's Faster R-CNN, whose losses come as a dict, with two heads behind one backbone.

python -m samples.integrations.detection
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

import fxcollab

Image = tuple[Tensor, dict[str, Tensor]]


def detector() -> nn.Module:
    """A small one of two classes, background and square, for images of 64 x 64."""
    stages = ((3, 16), (16, 32), (32, 32))
    layers = ((nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(4, o), nn.ReLU()) for i, o in stages)
    backbone = nn.Sequential(*(nn.Sequential(*layer) for layer in layers))
    backbone.out_channels = 32  # type: ignore[assignment]
    return FasterRCNN(
        backbone,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((26,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 4, 1),
        box_head=TwoMLPHead(32 * 16, 64),
        box_predictor=FastRCNNPredictor(64, 2),
    )


def images(count: int, seed: int) -> list[Image]:
    """Dark images (3, 64, 64), each with one bright square."""
    generator = torch.Generator().manual_seed(seed)
    return [_image(generator) for _ in range(count)]


def _image(generator: torch.Generator) -> Image:
    image = torch.rand(3, 64, 64, generator=generator) * 0.2
    side = int(torch.randint(20, 32, (), generator=generator))
    left, top = torch.randint(0, 32, (2,), generator=generator).tolist()
    image[:, top : top + side, left : left + side] += 0.8
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return image, {"boxes": box, "labels": torch.tensor([1])}


def batches(data: list[Image], size: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Of one size: the detector goes through a batch image by image, so that the graph has as many as the example."""
    for batch in DataLoader(data, size, shuffle=True, drop_last=True, collate_fn=list):
        yield [image for image, _ in batch], [target for _, target in batch]


def overlap(network: nn.Module, data: list[Image]) -> float:
    """The mean overlap of the likeliest box with the true one; the images are given all at once."""
    with torch.no_grad():
        found = network.eval()([image for image, _ in data])
    pairs = zip(found, data, strict=True)
    best = [box_iou(boxes["boxes"][:1], target["boxes"]) for boxes, (_, target) in pairs]
    return sum(float(each.sum()) for each in best) / len(data)


def main(epochs: int = 3, count: int = 32) -> float:
    """Train two heads, keep the first: its overlap on new images."""
    torch.manual_seed(0)
    data, model = images(count, seed=0), detector()
    train_model = fxcollab.transform(
        model, "simple", ["backbone"], heads=2, seed=0, example_inputs=next(batches(data, 4))
    )
    optimizer = torch.optim.SGD(train_model.parameters(), 0.01, 0.9)
    for epoch in range(epochs):
        for inputs, targets in batches(data, 4):
            losses = [sum(head.values()) for head in train_model(inputs, targets)]  # a dict of losses for each head
            optimizer.zero_grad()
            sum(losses).backward()
            nn.utils.clip_grad_norm_(train_model.parameters(), 5.0)
            optimizer.step()
        print(f"epoch {epoch}, losses {', '.join(f'{loss:.2f}' for loss in losses)}")
    network = fxcollab.prune(train_model, head=0, into=detector())
    return overlap(network, images(16, seed=1))


if __name__ == "__main__":
    print(f"overlap of the plain detector's boxes {main(20, 64):.0%}")
