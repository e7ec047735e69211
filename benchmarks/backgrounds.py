"""AP by background: how far the leaderboard's scores spread over the few photographs of `val`.

    python benchmarks/backgrounds.py --runs runs/compare/digits/runs

Reads the students that `drkd compare --config compare/digits` left in its run folders and the shipped teachers; writes
`backgrounds.json` and `backgrounds.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path

import torch

from drkd.adapters import load_detector
from drkd.contracts import Detections
from drkd.data.module import DetectionDataModule
from drkd.evaluation import CocoEvaluator

HERE = Path(__file__).resolve().parent


@torch.no_grad()
def main() -> None:
    """Detect once a model, score once a background."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare/digits/runs"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "leaderboard")
    options = parser.parse_args()
    data = DetectionDataModule("digits", workers=0, pad_to=(128, 128), min_size=128, max_size=128)
    split = data.split("val")
    annotations = json.loads((data.root / "annotations" / "instances_val.json").read_text())
    background = {image["id"]: image["background"] for image in annotations["images"]}
    folders = [folder for folder in sorted(options.runs.glob("*/*-seed*")) if folder.is_dir()]
    files = {f"{folder.parent.name}-{folder.name}": folder / "student.pt" for folder in folders}
    files |= {f"{name}-teacher": Path(f"drkd:digits_{name}") for name in ("retinanet", "faster_rcnn")}
    scores: dict[str, dict[str, float]] = {}
    for name, file in files.items():
        detector = load_detector(file, class_names=data.class_names)
        found: dict[int, Detections] = {}
        for batch in data.loader("val"):
            found.update(zip(batch.image_ids, detector.detect(batch), strict=True))
        for place in sorted(set(background.values())):
            records = [record for record in split.records if background[record.image_id] == place]
            evaluator = CocoEvaluator(records, split.class_names, area_scale=0.25)
            evaluator.update([r.image_id for r in records], [found[r.image_id] for r in records])
            scores.setdefault(re.sub(r"-seed\d+$", "", name), {}).setdefault(place, 0.0)
            scores[re.sub(r"-seed\d+$", "", name)][place] += evaluator.compute().ap
        print(name, flush=True)
    for name, by_place in scores.items():
        count = max(1, sum(1 for file in files if re.sub(r"-seed\d+$", "", file) == name))
        scores[name] = {place: value / count for place, value in by_place.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "backgrounds.json").write_text(json.dumps(scores, indent=1) + "\n")
    places = sorted(set(background.values()))
    lines = [f"| | {' | '.join(Path(place).stem for place in places)} | spread |", "|---|" + "--:|" * (len(places) + 1)]
    for name, by_place in sorted(scores.items()):
        values = [100 * by_place[place] for place in places]
        lines.append(f"| {name} | {' | '.join(f'{v:.1f}' for v in values)} | {statistics.stdev(values):.1f} |")
    lines += ["", "AP x 100 on the images of `val` with that background, mean over seeds; spread: standard deviation."]
    (options.out / "backgrounds.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
