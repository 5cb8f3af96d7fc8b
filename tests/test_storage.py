"cvslab.storage against a real S3 protocol server on loopback, healthy and faulty."
import multiprocessing, os, pickle, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from s3_server import KEYS, client, moto, proxy, upload, use

from cvslab import runner
from cvslab.core import Ledger, ParameterError, root
from cvslab.oct_models import check_checkpoint
from cvslab.storage import Mirror, Store, StorageError

FILES = {"participants.tsv": b"a\tb\n", **{f"oct/{i:02d}.dcm": bytes([i]) * (20_000 + i) for i in range(24)}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for key, data in FILES.items():
        (folder/key).parent.mkdir(exist_ok=True)
        (folder/key).write_bytes(data)
    with moto() as endpoint:
        upload(endpoint, folder, "eyes", "data/v2")
        yield endpoint, folder


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    "A healthy store with an empty cache, seen through a proxy that counts."
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path/"cache"))
    with proxy(server[0]) as front:
        use(monkeypatch, front.endpoint)
        store = Store("s3://eyes/data/v2")
        store.front = front
        yield store


def verbs(front): return [method for method, _, _ in front.seen]


def test_a_folder_and_a_bucket_read_the_same(server, store):
    local = Store(server[1])
    assert local.list()[["key", "size"]].equals(store.list()[["key", "size"]])
    assert {k: store.read(k) for k in FILES} == {k: local.read(k) for k in FILES} == FILES
    assert store.check("participants.tsv")["found"] == local.check("participants.tsv")["found"] == 2


def test_requests_cold_and_warm(server, store):
    key, front = "oct/07.dcm", store.front
    assert store.read(key) == FILES[key] and verbs(front) == ["HEAD", "GET"]
    front.seen.clear()
    assert store.read(key) == FILES[key] and verbs(front) == ["HEAD"]
    etag = store.list("oct").set_index("key").loc[key, "etag"]
    front.seen.clear()
    assert store.read(key, etag) == FILES[key] and verbs(front) == []
    assert store.requests == 4


def test_a_changed_file_is_fetched_again_and_the_old_copy_goes(server, store, tmp_path):
    s3 = client(server[0])
    s3.put_object(Bucket="eyes", Key="data/v2/changing", Body=b"old")
    assert store.read("changing") == b"old"
    s3.put_object(Bucket="eyes", Key="data/v2/changing", Body=b"newer")
    assert store.read("changing") == b"newer"
    assert len(list((tmp_path/"cache/storage").iterdir())) == 1
    s3.delete_object(Bucket="eyes", Key="data/v2/changing")


def test_what_a_service_off_aws_must_not_see(store):
    store.read("participants.tsv")
    for _, path, headers in store.front.seen:
        assert path.startswith("/eyes/") and not [h for h in headers if "checksum" in h.lower()]


def test_a_listing_has_all_its_pages(server, store, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
    assert store.list()["key"].tolist() == sorted(FILES)
    assert len(verbs(store.front)) == 5


def test_failures_cuts_and_pauses_change_nothing(server, monkeypatch, tmp_path):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    with proxy(server[0], fail=0.2, cut=0.15, stall=0.1, pause=4, seed=3) as front:
        use(monkeypatch, front.endpoint)
        store = Store("s3://eyes/data/v2", timeout=2)
        assert store.check("participants.tsv")["allowed"] and len(store.list()) == len(FILES)
        with ThreadPoolExecutor(8) as pool: assert dict(zip(FILES, pool.map(store.read, FILES))) == FILES
        assert {"fail", "cut", "stall"} <= set(front.faults)
        assert 2 * len(FILES) < store.requests <= len(front.seen) < 5 * len(FILES)    # aiohttp repeats a request itself when a kept connection was dropped


@pytest.mark.parametrize("faults", [dict(fail=1.0, statuses=(503,)), dict(cut=1.0)])
def test_the_limit_of_tries_is_kept(server, monkeypatch, tmp_path, faults):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    with proxy(server[0], **faults) as front:
        use(monkeypatch, front.endpoint)
        with pytest.raises(StorageError, match="after 3 tries"): Store("s3://eyes/data/v2", tries=3).read("participants.tsv")
        gets = 3 if "cut" in faults else 0
        assert verbs(front) == (["HEAD"] + ["GET"] * gets if gets else ["HEAD"] * 3)
        assert not list(tmp_path.rglob("*participants*")) and not list(tmp_path.rglob(".part-*"))


def refusal(url, *needed, **kw):
    with pytest.raises(StorageError) as caught: Store(url, **kw).check(*needed)
    return caught.value


def test_each_refusal_names_its_reason(server, monkeypatch):
    use(monkeypatch, server[0])
    for url, needed, kind, words in [("s3://other/data", (), "missing", "no such bucket"), ("s3://eyes/data/v9", (), "missing", "s3://eyes/data/v9"),
                                     ("s3://eyes/data", ("participants.tsv",), "missing", "it holds ['v2']")]:
        error = refusal(url, *needed)
        assert error.kind == kind and words in str(error)
    use(monkeypatch, "http://127.0.0.1:9")
    assert refusal("s3://eyes/data/v2", tries=4).kind == "unreachable"
    use(monkeypatch, "http://no-such-host.invalid")
    assert refusal("s3://eyes/data/v2", tries=2).kind == "unreachable"


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///data/v2", "s3://eyes//data", "s3://eyes/data//v2", "s3:/eyes/data", "s3:eyes", "gs://", "gs:///x", "s3://ey es/data",
                                 "s3://eyes/da\nta", "s3://eyes/data\r", "s3://eyes/\x07", "s3://eyes/'data'", 's3://"eyes/data"', "s3://ey:es/data",
                                 "'s3://eyes/data'", '"s3://eyes/data"', " s3://eyes/data", "\n's3://eyes'", '"gs://eyes/data"'])
def test_a_url_that_names_no_place_is_refused_before_anything_is_asked(server, store, url, monkeypatch):
    with pytest.raises(ValueError, match=r"names no bucket|empty part|no URL of a bucket|control character|stands in quotes"): Store(url)
    monkeypatch.setenv("CVSLAB_MIRROR", url)
    with pytest.raises(ValueError): Mirror.of(root()/"outputs/10_lora/x")
    with pytest.raises(ParameterError, match="data="): runner.plan(["31.yaml"], values=dict(data=url))
    assert not store.front.seen


@pytest.mark.parametrize("key", ["oct/07.dcm\n", "oct/\r07.dcm", "a\tb", "\x00", "oct/\x7f", '"oct/07.dcm"', "'oct/07.dcm'"])
def test_a_key_that_is_none_is_named_without_a_request(server, store, key):
    for ask in (store.read, store.get, store.first, lambda k: store.read(k, "etag"), lambda k: store.fetch(k, "nowhere")):
        with pytest.raises(StorageError, match="control character|stands in quotes") as caught: ask(key)
        assert caught.value.kind == "missing" and repr(key)[1:-1] in str(caught.value)
    assert not store.front.seen


@pytest.mark.parametrize("key", ["a b.txt", "ä#2.txt", "it's.txt", 'say "a".txt', "a//b.txt", "50%20.txt", "a+b?.txt", "[0]*.txt"])
def test_an_odd_key_that_is_one_is_read(server, store, key):
    client(server[0]).put_object(Bucket="eyes", Key=f"odd/{key}", Body=b"here")
    odd = Store("s3://eyes/odd")
    assert odd.read(key) == b"here" and key in odd.list()["key"].tolist() and odd.first(key) == (b"here", 4)


@pytest.mark.parametrize("storage_class", ["GLACIER", "DEEP_ARCHIVE"])
def test_an_archived_object_is_named_with_its_remedy_and_asked_once(server, store, storage_class):
    client(server[0]).put_object(Bucket="eyes", Key="data/v2/cold", Body=b"cold", StorageClass=storage_class)
    try:
        for ask in (store.read, store.first):
            store.front.seen.clear()
            with pytest.raises(StorageError, match="archive.*restore-object") as caught: ask("cold")
            assert caught.value.kind == "forbidden" and verbs(store.front) == ["HEAD", "GET"]
    finally: client(server[0]).delete_object(Bucket="eyes", Key="data/v2/cold")


def test_a_requester_pays_refusal_is_named_and_the_payer_is_said(server, monkeypatch):
    with proxy(server[0], fail=1.0, statuses=("Access Denied",)) as front:
        use(monkeypatch, front.endpoint)
        error = refusal("s3://eyes/data/v2")
        assert error.kind == "forbidden" and "AWS_REQUEST_PAYER=requester" in str(error) and len(front.seen) == 1
    with proxy(server[0]) as front:
        use(monkeypatch, front.endpoint)
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
        payer = Store("s3://eyes/data/v2")
        payer.check("participants.tsv")
        assert payer.read("participants.tsv") and len(payer.list()) == len(FILES)
        assert {headers.get("x-amz-request-payer") for _, _, headers in front.seen} == {"requester"}


def test_a_checkpoint_in_a_bucket_is_known_by_its_first_bytes(server, store, monkeypatch):
    for name, body, words in (("page.pt", b"<!DOCTYPE html>", "a web page"), ("pointer.pt", b"version https://git-lfs", "a pointer"), ("none.pt", b"", "an empty file")):
        client(server[0]).put_object(Bucket="eyes", Key=f"ckpt/{name}", Body=body)
        with pytest.raises(ParameterError, match=f"checkpoint {name} is {words}"): runner.plan(["31.yaml"], values=dict(data="demo", checkpoint=f"s3://eyes/ckpt/{name}"))
    client(server[0]).put_object(Bucket="eyes", Key="ckpt/big.pt", Body=b"PK\x03\x04" + bytes(10**6))
    store.front.seen.clear()
    check_checkpoint("s3://eyes/ckpt/big.pt")
    assert [h.get("Range") for v, _, h in store.front.seen if v == "GET"] == ["bytes=0-511"]


def test_wrong_and_absent_keys_are_refused(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    reset = lambda n: urllib.request.urlopen(urllib.request.Request(server[0] + "/moto-api/reset-auth", data=n, headers={"Content-Type": "text/plain"}), timeout=5)
    reset(b"0")
    try:
        use(monkeypatch, server[0], AWS_ACCESS_KEY_ID="AKIA" + "WRONG00000000000", AWS_SECRET_ACCESS_KEY="a-wrong-secret-of-some-length")
        error = refusal("s3://eyes/data/v2")
        assert error.kind == "forbidden" and "AWS_ACCESS_KEY_ID" in str(error)
    finally: reset(b"Infinity")
    for name in KEYS: monkeypatch.delenv(name)
    error = refusal("s3://eyes/data/v2")
    assert error.kind == "forbidden" and "no key was found" in str(error)


@pytest.mark.parametrize("source", ["environment", "profile"])
def test_a_server_that_repeats_the_key_is_not_quoted(server, monkeypatch, tmp_path, source):
    secrets = dict(AWS_ACCESS_KEY_ID="004f0f0f0f0f0f0000000001", AWS_SECRET_ACCESS_KEY="K004-a-secret-of-some-length")
    with proxy(server[0], fail=1.0, statuses=("the key {AWS_ACCESS_KEY_ID} with {AWS_SECRET_ACCESS_KEY} is not valid".format(**secrets),)) as front:
        use(monkeypatch, front.endpoint, **secrets)
        if source == "profile":
            for name in KEYS: monkeypatch.delenv(name)
            (tmp_path/"credentials").write_text("[default]\n" + "".join(f"{k.lower()} = {v}\n" for k, v in secrets.items()))
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path/"credentials"))
        text = str(refusal("s3://eyes/data/v2"))
    assert "is not valid" in text and "Signature=***" in text
    for secret in secrets.values(): assert secret not in text


def test_no_secret_in_any_file_or_pickle(server, store, tmp_path):
    ledger = Ledger(tmp_path/"data_errors.csv", max_share=1)
    for key in [*FILES, "absent"]:
        try: store.read(key)
        except StorageError as e: ledger.add("1001", e)
    ledger.check(len(FILES))
    assert "absent" in (tmp_path/"data_errors.csv").read_text()
    written = b"".join(p.read_bytes() + p.name.encode() for p in tmp_path.rglob("*") if p.is_file())
    for secret in KEYS.values(): assert secret.encode() not in written + pickle.dumps(_plain(store)) + repr(store).encode()


def _plain(store):
    "The store without the test's own proxy."
    return Store.__new__(Store).__dict__ | {k: v for k, v in store.__getstate__().items() if k != "front"}


def test_the_cache_keeps_its_bound_and_the_newest(server, store, tmp_path):
    store.cache_bytes = 65_000
    for key in [*FILES, "oct/01.dcm", "oct/05.dcm", "oct/01.dcm", "oct/09.dcm"]: assert store.read(key) == FILES[key]
    kept = [p for p in (tmp_path/"cache/storage").iterdir()]
    assert sum(p.stat().st_size for p in kept) <= 65_000 and len(kept) == 3
    store.front.seen.clear()
    for key in ("oct/01.dcm", "oct/05.dcm", "oct/09.dcm"): store.read(key)
    assert verbs(store.front) == ["HEAD"] * 3


def _read_all(store, out=None):
    good = all(store.read(key) == data for _ in range(2) for key, data in FILES.items())
    if out is not None: out.put(good)
    return good


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache_that_is_too_small(server, monkeypatch, tmp_path, method):
    monkeypatch.setenv("CVSLAB_CACHE", str(tmp_path))
    use(monkeypatch, server[0])
    store = Store("s3://eyes/data/v2", cache_gb=1e-4)
    assert store.read("participants.tsv")                                       # the parent's filesystem is in use before the fork
    context = multiprocessing.get_context(method)
    out = context.Queue()
    workers = [context.Process(target=_read_all, args=(store, out)) for _ in range(2)]
    for w in workers: w.start()
    assert [out.get(timeout=30) for _ in workers] == [True] * 2
    for w in workers: w.join(10)
    assert store.read("participants.tsv") == FILES["participants.tsv"] and not list(tmp_path.rglob(".part-*"))
