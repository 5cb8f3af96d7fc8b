"The attention explorer as a reader meets it: JupyterLab on loopback, headless Chromium, a slider moved by keyboard."
import json, os, secrets, shutil, signal, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager

import pytest
from conftest import ROOT
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
STATISTICS = ".widget-html-content:has-text('effective tokens')"
PAGE = "25_attention_explorer"
READY = """() => {
    const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget, session = panel && panel.sessionContext
    const kernel = session && session.isReady && session.session && session.session.kernel
    return !!kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle'
}"""

@contextmanager
def jupyterlab(project, home):
    "JupyterLab in `project` with folders of its own under `home`; yields its address and token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, folders = secrets.token_hex(16), {n: home/n for n in ("config", "data", "runtime", "settings", "workspaces", "ipython")}
    for folder in folders.values(): folder.mkdir(parents=True)
    quiet = folders["settings"]/"@jupyterlab/apputils-extension"
    quiet.mkdir(parents=True)
    (quiet/"notification.jupyterlab-settings").write_text(json.dumps(dict(fetchNews="false", checkForUpdates=False)))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | dict(
        JUPYTER_CONFIG_DIR=str(folders["config"]), JUPYTER_DATA_DIR=str(folders["data"]), JUPYTER_RUNTIME_DIR=str(folders["runtime"]),
        IPYTHONDIR=str(folders["ipython"]), CVSLAB_CACHE=os.environ.get("CVSLAB_CACHE", str(ROOT/".cache")), PYTHONPATH=str(project))
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
           "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={project}",
           f"--LabApp.user_settings_dir={folders['settings']}", f"--LabApp.workspaces_dir={folders['workspaces']}", "--LabApp.expose_app_in_browser=True"]
    log = home/"server.log"
    with open(log, "w") as out: server = subprocess.Popen(cmd, cwd=project, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).close()
                break
            except OSError: time.sleep(.2)
        else: pytest.fail(f"JupyterLab did not answer within a minute:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}", token
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(10)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)

@contextmanager
def open_page(address, token, notebook):
    "The notebook open in Chromium, its kernel idle."
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport=dict(width=1500, height=1000))
            page.set_default_timeout(60_000)
            page.goto(f"{address}/lab/tree/nbs/{notebook}.ipynb?reset&token={token}")
            page.wait_for_function(READY)
            yield page
        finally: browser.close()

def run_all(page):
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")

def no_error(page):
    found = page.locator("[data-mime-type='application/vnd.jupyter.stderr'], .jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    errors = [t for t in found.all_inner_texts() if "Error" in t or "Traceback" in t]
    assert not errors, "\n".join(errors)
    assert "Error displaying widget" not in page.inner_text("body")

PIXELS = """async () => {
    const bytes = await (await fetch(document.querySelector('img.widget-image').src)).arrayBuffer()
    return [...new Uint8Array(await crypto.subtle.digest('SHA-256', bytes))].join()
}"""

def picture(page):
    "Hash of the bytes the browser shows."
    return page.evaluate(PIXELS)

def slider(page, name):
    "The handle of the slider that is described by `name`."
    row = page.locator(".widget-inline-hbox", has=page.locator(f".widget-label:text-is('{name}')"))
    return row.locator(".noUi-handle").first

def move(page, name):
    "Take a slider one step by its arrow key, left unless it is at its start; the picture must follow."
    before, source, handle = picture(page), page.get_attribute("img.widget-image", "src"), slider(page, name)
    low, now = (float(handle.get_attribute(f"aria-value{x}")) for x in ("min", "now"))
    handle.focus()
    page.keyboard.press("ArrowLeft" if now > low else "ArrowRight")
    page.wait_for_function("was => document.querySelector('img.widget-image').src !== was", arg=source)
    assert picture(page) != before, f"{name}: the same picture"

@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: `apt-get install chromium`, or name its binary in CHROMIUM")
def test_explorer_in_a_browser(project, tmp_path_factory):
    with jupyterlab(project, tmp_path_factory.mktemp("jupyter")) as server, open_page(*server, PAGE) as page:
        run_all(page)
        page.wait_for_selector("img.widget-image")
        page.wait_for_function("() => document.querySelector('img.widget-image').naturalWidth > 500")
        no_error(page)
        words = page.inner_text(STATISTICS)
        move(page, "layer")
        assert page.inner_text(STATISTICS) != words, "the statistics did not follow"
        for name in ("query row", "head", "frame", "clip"): move(page, name)
        page.wait_for_function(READY)
        no_error(page)
