"The OCT cohort and its volumes from an S3 bucket: the same numbers as from a folder, whatever the server does."
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from s3_server import KEYS, moto, proxy, upload, use

from cvslab.core import Ledger
from cvslab.demo import draw_oct
from cvslab.oct_models import load_oct_encoder
from cvslab.storage import Store, StorageError
from cvslab.volumes import Choice, Preprocess, VolumeSet, read_cohort, stream

PREP = Preprocess((16, 64, 64))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory): return draw_oct(tmp_path_factory.mktemp("oct")/"drawn", scale=0.02, broken=False)


@pytest.fixture(scope="module")
def bucket(drawn):
    with moto() as endpoint:
        upload(endpoint, drawn, "eyes", "ai-readi/dataset")
        yield endpoint


def tensors(store, eye="R"):
    cohort, ledger = read_cohort(store, Choice(eye=eye)), Ledger(max_share=0)
    out = {row.participant: x for row, x, _ in stream(cohort.table, store, PREP, ledger)}
    ledger.check(len(cohort.table))
    return cohort, out


def test_a_bucket_gives_the_same_cohort_and_tensors_and_counts_its_requests(drawn, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"local"))
    here, expected = tensors(Store(drawn))
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"remote"))
    with proxy(bucket) as front:
        use(monkeypatch, front.endpoint)
        there, cold = tensors(Store("s3://eyes/ai-readi/dataset"))
        volumes = [path for _, path, _ in front.seen if ".dcm" in path]
        assert len(volumes) == 2 * len(cold)                                                       # one HEAD and one GET a volume
        front.seen.clear()
        _, warm = tensors(Store("s3://eyes/ai-readi/dataset"))
        assert not [path for _, path, _ in front.seen if ".dcm" in path] and len(front.seen) < 15
    assert here.card["fingerprint"] == there.card["fingerprint"]
    for p, x in expected.items(): assert torch.equal(x, cold[p]) and torch.equal(x, warm[p])
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert not any(secret.encode() in written for secret in KEYS.values())


def test_a_server_that_fails_cuts_and_pauses_gives_the_same_tensors(drawn, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"local"))
    _, expected = tensors(Store(drawn))
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"remote"))
    with proxy(bucket, fail=0.2, cut=0.1, stall=0.05, pause=4, seed=5) as front:
        use(monkeypatch, front.endpoint)
        _, got = tensors(Store("s3://eyes/ai-readi/dataset", timeout=2))
        assert {"fail", "cut", "stall"} <= set(front.faults)
    assert got.keys() == expected.keys() and all(torch.equal(x, got[p]) for p, x in expected.items())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_a_bucket_under_fork_and_spawn(bucket, monkeypatch, tmp_path, method):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    use(monkeypatch, bucket)
    store = Store("s3://eyes/ai-readi/dataset")
    table = read_cohort(store).table.head(8)
    loader = torch.utils.data.DataLoader(VolumeSet(table, store, PREP), 4, num_workers=1, multiprocessing_context=method)
    got = torch.cat([batch["video"] for batch in loader])
    assert torch.equal(got, torch.stack([x for _, x, _ in stream(table, store, PREP, Ledger(max_share=0))]))


def test_an_encoder_comes_from_a_bucket_as_from_a_folder(drawn, bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    use(monkeypatch, bucket)
    here, there = (load_oct_encoder(f"{place}/checkpoints/multi_domain.pt", "demo") for place in (drawn, "s3://eyes/ai-readi/dataset"))
    assert here.card == there.card and all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters()))
    with pytest.raises(StorageError, match="missing"): load_oct_encoder("s3://eyes/ai-readi/dataset/checkpoints/no.pt", "demo")
