"""Builds the Dockerfile where there is no container engine, runs the image's command, and says how large the image is.

    python deploy/image_check.py FOLDER MODEL    # as root, on Debian with debootstrap; FOLDER is made, and may be kept

A stage is a folder in FOLDER, chroot stands for the engine, and `debootstrap --variant=minbase` for a Debian image.
Then the image's command runs as its user, in a network of its own, on a root that nobody can write to and with an
empty cache, until HEALTHCHECK passes and a completion has come.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
ASK = (
    "from urllib.request import urlopen; "
    'body = b\'{"prompt": "Once upon", "max_tokens": 8}\'; '
    "print(urlopen('http://127.0.0.1:8000/v1/completions', body).read().decode())"
)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction's word, and the rest of it."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


class Stage:
    """A stage's folder, and what its commands find around them."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.user = root, "/", "0:0"
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.command: dict[str, list[str]] = {}

    def run(self, command: str) -> None:
        """A command of the build, with this machine's resolver and, for pip alone, its certificates."""
        etc, outer = self.root / "etc", {"PIP_CERT": "/run/host.crt"}
        (etc / "resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
        (self.root / "run/host.crt").write_bytes(Path("/etc/ssl/certs/ca-certificates.crt").read_bytes())
        line = [*NAMESPACES, f"--root={self.root}", f"--wd={self.folder}", "--mount-proc", "sh", "-c", command]
        subprocess.run(line, env={**outer, **self.environment}, check=True)

    def copy(self, arguments: str, stages: dict[str, Stage]) -> None:
        """COPY of a folder: from a stage, or of what .dockerignore lets through."""
        *flags, source, target = shlex.split(arguments)
        options = dict(flag[2:].split("=") for flag in flags)
        destination = self.root / target.lstrip("/")
        destination.mkdir(parents=True, exist_ok=True)
        if "from" in options:
            subprocess.run(["cp", "-a", f"{stages[options['from']].root}{source}/.", destination], check=True)
        else:
            ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
            names = [line[1:] for line in ignore if line.startswith("!")]
            skipped = [f"--exclude={line[3:]}" for line in ignore if line.startswith("**/")]
            tar = ["tar", "-C", REPOSITORY, *skipped, "-c", *names]
            packed = subprocess.run(tar, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "-C", destination, "-x"], input=packed.stdout, check=True)
        if "chown" in options:
            subprocess.run(["chown", "-R", options["chown"], destination], check=True)


def build(folder: Path) -> Stage:
    """The last stage."""
    stages: dict[str, Stage] = {}
    stage = Stage(folder)
    for word, rest in instructions(REPOSITORY / "Dockerfile"):
        print(f"image_check: {word} {rest}", flush=True)
        match word:
            case "FROM":
                name = rest.split(" AS ")[-1]
                stage = stages[name] = Stage(folder / name)
                if found := re.match(r"debian:(\w+)-slim", rest):
                    subprocess.run(["debootstrap", "--variant=minbase", found[1], stage.root], check=True)
                else:
                    stage.root.mkdir(parents=True)
            case "ARG" | "ENV":
                for pair in shlex.split(rest):
                    key, _, value = pair.partition("=")
                    stage.environment[key] = re.sub(r"\$(\w+)", lambda m: stage.environment[m[1]], value)  # noqa: B023
            case "WORKDIR":
                stage.folder = rest
                (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "RUN":
                stage.run(rest)
            case "COPY":
                stage.copy(rest, stages)
            case "USER":
                stage.user = rest
            case "ENTRYPOINT" | "CMD":
                stage.command[word] = json.loads(rest)
            case "HEALTHCHECK":
                stage.command[word] = json.loads(rest[rest.index("CMD") + 3 :])
            case "VOLUME" | "EXPOSE":
                pass
            case _:
                sys.exit(f"image_check: {word} is not known here")
    return stage


def try_out(stage: Stage, model: Path) -> None:
    """Runs the image's command on a model, and asks it something."""
    uid, gid = stage.user.split(":")
    inside = shlex.join(
        ["unshare", f"--root={stage.root}", f"--wd={stage.folder}", f"--setuid={uid}", f"--setgid={gid}"]
    )
    command = shlex.join([*stage.command["ENTRYPOINT"], *stage.command["CMD"], "-m", f"/tmp/model/{model.name}"])
    root = shlex.quote(str(stage.root))
    script = f"""
        set -e
        ip link set lo up
        mount --bind {root} {root} && mount -o remount,bind,ro {root} && mount -t tmpfs tmpfs {root}/tmp
        mkdir {root}/tmp/model && mount --bind {shlex.quote(str(model.parent))} {root}/tmp/model
        mount -t tmpfs -o uid={uid} tmpfs {root}/cache
        {inside} {command} & server=$!
        for second in $(seq 60); do
          if {inside} {shlex.join(stage.command["HEALTHCHECK"])} 2> /dev/null; then
            {inside} python3 -c {shlex.quote(ASK)}
            kill $server && wait $server
            exit
          fi
          sleep 1
        done
        exit 1
    """
    subprocess.run([*NAMESPACES, "--net", "bash", "-c", script], env=stage.environment, check=True)


def main(folder: str, model: str) -> None:
    started = time.monotonic()
    stage = build(Path(folder).resolve())
    print(f"image_check: built in {time.monotonic() - started:.0f} s", flush=True)
    try_out(stage, Path(model).resolve())
    packed = subprocess.run(
        f"tar -C {shlex.quote(str(stage.root))} -c . | gzip", shell=True, stdout=subprocess.PIPE, check=True
    )
    files = [file for file in stage.root.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"image_check: {size:.1f} MB in {len(files)} files; as a layer (tar, gzip) {len(packed.stdout) / 1e6:.1f} MB")


if __name__ == "__main__":
    if os.geteuid() or len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
