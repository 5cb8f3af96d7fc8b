"Usage: python tests/above_chance.py outputs/10_lora 3 -- that many demo runs there, each with all files of the contract and an interval above chance."
import json, sys
from pathlib import Path

CONTRACT = {"params.json", "applied.json", "history.csv", "predictions.parquet", "metrics.json", "checkpoint", "environment.txt", "manifest.csv"}

def main(folder, expected):
    runs = sorted(Path(folder).glob("*/metrics.json"))
    assert len(runs) == expected, f"{len(runs)} finished runs in {folder}, {expected} were expected"
    for path in runs:
        assert CONTRACT <= {p.name for p in path.parent.iterdir()}, f"{path.parent} lacks {CONTRACT - {p.name for p in path.parent.iterdir()}}"
        m = json.loads(path.read_text())
        print(f"{path.parent.name}: mAP {m['map']['value']:.3f} [{m['map']['lo']:.3f}, {m['map']['hi']:.3f}], chance {m['map']['chance']:.3f}, {m['n_videos']} {m['protocol']['split']} videos")
        assert m["n_videos"] >= 12 and m["protocol"]["split"] == "val" and m["map"]["lo"] > m["map"]["chance"]

if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]))
