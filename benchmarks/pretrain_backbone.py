"""Pre-train the students' backbone as a classifier of digit crops, in about five minutes on one core.

    python benchmarks/pretrain_backbone.py --out src/drkd/assets/digits_resnet18_quarter.pt

A detector from scratch spends most of a short run on finding out what a digit is. Both arms of every comparison
(student alone, student distilled) start from this file. The crops come from the `train` split only: a digit with 1.05
to 2 times its size around it, resized to 48 px, or an empty piece of background as an eleventh class.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_functional

from drkd.contracts import ImageRecord
from drkd.data.dataset import load_split
from drkd.data.digits import build_digits
from drkd.data.image import decode_image

SIZE, BATCH = 48, 64


def main() -> None:
    """Train, report the accuracy on the `tune` split's crops, write the weights in half precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    started = time.monotonic()
    root = build_digits()
    channels = [max(8, round(64 * options.width * 2**stage / 8) * 8) for stage in range(4)]
    model = timm.create_model("resnet18", channels=channels, num_classes=11).to(memory_format=torch.channels_last)
    records = load_split(root, "train").records
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    per_epoch = sum(len(record.labels) for record in records) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.epochs * (per_epoch + 8))
    for epoch in range(options.epochs):
        model.train()
        crops, labels = cut_crops(records, seed=options.seed * 1000 + epoch)
        order = torch.randperm(len(labels))
        total = 0.0
        for chosen in order.split(BATCH)[: per_epoch + 8]:
            loss = nn.functional.cross_entropy(model(jitter(crops[chosen])), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / (per_epoch + 8):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"accuracy on tune crops: {accuracy(model, *cut_crops(load_split(root, 'tune').records, seed=7)):.3f}")
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items() if not name.startswith("fc.")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = options.out.with_suffix(".part")
    torch.save(state, aside)
    aside.replace(options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


def cut_crops(records: tuple[ImageRecord, ...], *, seed: int) -> tuple[Tensor, Tensor]:
    """Cut one crop a box, and one of background an image where an empty place is found: (N, 3, 48, 48), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    crops, labels = [], []
    for record in records:
        image = decode_image(record.path, record.size).float() / 255
        for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True):
            side = max(box[2] - box[0], box[3] - box[1])
            scale, dx, dy = torch.rand(3, generator=generator).tolist()
            reach = side * (1.05 + 0.95 * scale**2)
            slack = 0.5 * (reach - side)
            x = 0.5 * (box[0] + box[2]) - reach / 2 + (2 * dx - 1) * slack
            y = 0.5 * (box[1] + box[3]) - reach / 2 + (2 * dy - 1) * slack
            crops.append(crop(image, x, y, reach))
            labels.append(label)
        place = torch.rand(3, generator=generator).tolist()
        reach = 12 + 36 * place[0]
        x, y = place[1] * (image.shape[2] - reach), place[2] * (image.shape[1] - reach)
        boxes = record.boxes
        inside = (boxes[:, 0] < x + reach) & (boxes[:, 2] > x) & (boxes[:, 1] < y + reach) & (boxes[:, 3] > y)
        if not bool(inside.any()):
            crops.append(crop(image, x, y, reach))
            labels.append(10)
    return torch.stack(crops).to(memory_format=torch.channels_last), torch.tensor(labels)


def crop(image: Tensor, x: float, y: float, side: float) -> Tensor:
    """A square piece at 48 px, zero outside the image."""
    whole = max(2, round(side))
    piece = image_functional.crop(image, round(y), round(x), whole, whole)
    return image_functional.resize(piece, [SIZE, SIZE], antialias=True)


def jitter(crops: Tensor) -> Tensor:
    """Random contrast, brightness and channel gain for each crop, then ImageNet's mean and deviation."""
    gain = 1 + 0.3 * (2 * torch.rand(len(crops), 3, 1, 1) - 1)
    shift = 0.15 * (2 * torch.rand(len(crops), 1, 1, 1) - 1)
    return normalise((crops * gain + shift).clamp(0, 1))


def normalise(crops: Tensor) -> Tensor:
    """What the detectors do with an image."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (crops - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, crops: Tensor, labels: Tensor) -> float:
    """Share of crops that are classified right."""
    model.eval()
    right = sum(
        int((model(normalise(part)).argmax(1) == label).sum())
        for part, label in zip(crops.split(256), labels.split(256), strict=True)
    )
    return right / len(labels)


if __name__ == "__main__":
    main()
