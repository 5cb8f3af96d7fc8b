from configparser import ConfigParser
from setuptools import find_packages, setup

# Every setting lives in settings.ini; edit there, not here.
ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"] + "*"]),
    package_data={cfg["lib_path"]: cfg["package_data"].split()},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[extra + "_requirements"].split() for extra in ("dev", "xla", "tpu")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
