"A real S3 protocol server on loopback (moto's), and a proxy in front of it that fails, cuts and stalls."
import contextlib, http.client, random, socket, threading, time, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

KEYS = dict(AWS_ACCESS_KEY_ID="AKIA" + "LOOPBACK00000000", AWS_SECRET_ACCESS_KEY="loopback-secret-0123456789abcdef")
CLEAN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_REGION", "AWS_CA_BUNDLE")


def use(monkeypatch, endpoint, **keys):
    "Point this process's environment at `endpoint`, with `keys` instead of the loopback's."
    for name in CLEAN: monkeypatch.delenv(name, raising=False)
    for name, value in (KEYS | keys).items(): monkeypatch.setenv(name, value)
    for name, value in dict(AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
                            NO_PROXY="127.0.0.1", no_proxy="127.0.0.1").items(): monkeypatch.setenv(name, value)


@contextlib.contextmanager
def moto():
    "Endpoint of a fresh moto server; servers of one process share what they hold, so it is emptied at the end."
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    try: yield endpoint
    finally:
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
        server.stop()


def client(endpoint):
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
                        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"])


def upload(endpoint, folder, bucket, prefix=""):
    "Put every file of `folder` into `bucket` (made where missing) under `prefix`."
    s3 = client(endpoint)
    if bucket not in [b["Name"] for b in s3.list_buckets()["Buckets"]]: s3.create_bucket(Bucket=bucket)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file(): s3.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"), Body=path.read_bytes())


class Proxy(ThreadingHTTPServer):
    "Forwards to `target`; of the requests a share `fail` is refused (by one of `statuses`; None hangs up, a text is sent as the reason of a 403), `cut` loses half its body, `stall` waits in mid-body."
    daemon_threads, request_queue_size = True, 128

    def __init__(self, target, fail=0.0, cut=0.0, stall=0.0, pause=0.2, seed=0, statuses=(500, 503, None)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.fail, self.cut, self.stall, self.pause = target.removeprefix("http://"), fail, cut, stall, pause
        self.statuses, self.random, self.lock, self.seen, self.faults = statuses, random.Random(seed), threading.Lock(), [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self): return "http://127.0.0.1:%d" % self.server_address[1]

    def fault(self, request):
        with self.lock:
            self.seen.append(request)
            dice = self.random.random()
            kind = ("fail" if dice < self.fail else "cut" if dice < self.fail + self.cut else "stall" if dice < self.fail + self.cut + self.stall else None)
            if kind: self.faults.append(kind)
            return kind, self.random.choice(self.statuses)

    def handle_error(self, *_): "A client that hangs up is no news."


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def forward(self):
        fault, status = self.server.fault((self.command, self.path, dict(self.headers)))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "fail":
            if status is None: return self.hang_up()
            reason = f"<Error><Code>AccessDenied</Code><Message>{status} {self.headers.get('Authorization')}</Message></Error>" if isinstance(status, str) else ""
            self.send_response(403 if reason else status)
            self.send_header("Content-Length", str(len(reason)))
            self.end_headers()
            return self.wfile.write(reason.encode())
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"): self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command == "HEAD": return
        half = len(data) // 2
        self.wfile.write(data[:half])
        if fault == "cut": return self.hang_up()
        if fault == "stall":
            self.wfile.flush()
            time.sleep(self.server.pause)
        self.wfile.write(data[half:])

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward


@contextlib.contextmanager
def proxy(target, **faults):
    server = Proxy(target, **faults)
    try: yield server
    finally:
        server.shutdown()
        server.server_close()
