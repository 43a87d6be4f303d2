"""AVX-512 without the processor: the operators compiled for it repeat the tests' calls in an emulated machine.

    python -m tests.native.emulator.run     # some five minutes for each of two processors

What is recorded here is computed with the same layout of memory and the instructions written out; the machine that
repeats it runs the code that a user's compiler makes. On Debian, as root, with

    apt-get install bochs bochsbios vgabios bochs-term isolinux syslinux-common xorriso busybox-static cpio

and a kernel, which is downloaded (`apt-get download`). Nothing is timed: the emulator says nothing about speed.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vat_fast.native import library

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
INSTRUCTIONS = HERE.with_name("instructions.hpp")
TESTS = (
    "(test_native_integers and this) or (test_native_functions and (None or overflow or anyhow)) or test_native_shares "
    "or (every_variant_equals and native) or int8_follows or int16_is_nearer"
)
MOST_SECONDS = 1800
MOST_DIFFERENCE = 1e-3
"""Relative to the largest number; that much in gradients which cancel to nothing but rounding, 1e-5 elsewhere."""
# What Bochs 2.7 tells of saved registers contradicts itself; without these features Linux does not ask.
BOOT = (
    "console=ttyS0 earlyprintk=serial,ttyS0,115200 rdinit=/init nokaslr noibrs nospectre_v2 nopku no5lvl noxsaves "
    "clearcpuid=515,516,321,323,580,514,297,513 nox2apic nosmap nosmep noumip nofsgsbase nopti nopcid"
)
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
export LD_LIBRARY_PATH={libraries} PYTHONDONTWRITEBYTECODE=1
{python} -S /replay.py /operators.so /record
/bin/busybox sleep 5
/bin/busybox poweroff -f
"""
BOCHS = """cpu: model={model}, count=1, ips=100000000
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
display_library: term
clock: sync=none
log: /dev/null
error: action=ignore
info: action=ignore
"""


@dataclass(frozen=True)
class Processor:
    """Who is emulated, and how its instructions are asked of the compiler and of `instructions.hpp`."""

    model: str
    march: str
    flags: str


PROCESSORS = (
    Processor("corei7_skylake_x", "skylake-avx512", "-DVAT_LANES=16 -DVAT_INTEGERS=512 -DVAT_VNNI=0"),
    Processor("corei7_icelake_u", "icelake-client", "-DVAT_LANES=16 -DVAT_INTEGERS=512 -DVAT_VNNI=1"),
)


def record(processor: Processor, path: Path) -> None:
    """The tests' calls, computed here."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RECORD": str(path),
        "FLAGS": f"{processor.flags} -include {INSTRUCTIONS}",
        # Not where other builds are: the recorder's flags are not in their names.
        "XDG_CACHE_HOME": str(path.parent / "cache"),
    }
    where = ["tests/native", "tests/frozen/test_cpu_executors.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.native.emulator.record", *where, "-k", TESTS]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def compiled(processor: Processor, folder: Path) -> Path:
    """The operators as a user of such a processor gets them."""
    flags = [flag for flag in library._FLAGS if not flag.startswith("-march")]
    target = folder / "operators.so"
    sources = map(str, sorted(library._SOURCE.glob("*.cpp")))
    subprocess.run(["g++", *flags, f"-march={processor.march}", *sources, "-o", str(target)], check=True)
    return target


def kernel(folder: Path) -> Path:
    """A Linux that boots in an emulator."""
    name = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True).stdout
    package = re.search(r"linux-image-\S+-cloud-amd64", name.replace("linux-image-cloud-amd64", ""))
    if package is None:
        raise SystemExit("no kernel found: run apt-get update on a Debian")
    subprocess.run(["apt-get", "download", package[0]], cwd=folder, check=True)
    subprocess.run(["dpkg", "-x", str(next(folder.glob("linux-image*.deb"))), str(folder / "kernel")], check=True)
    return next((folder / "kernel" / "boot").glob("vmlinuz-*"))


def file_system(operators: Path, recorded: Path, root: Path) -> None:
    """What is in the machine: Python, the operators, the record."""
    python, standard = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    for folder in ("proc", "dev", "bin", "tmp"):
        (root / folder).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "busybox", root / "bin" / "busybox")
    left_out = shutil.ignore_patterns("test", "tests", "site-packages", "__pycache__", "config-*", "idlelib", "tkinter")
    shutil.copytree(standard, root / standard.relative_to("/"), ignore=left_out, symlinks=True)
    modules = [*standard.glob("lib-dynload/*ctypes*.so"), *standard.glob("lib-dynload/[am]*.so")]
    files = {python, operators}
    for binary in (python, operators, *modules):
        found = subprocess.run(["ldd", str(binary)], capture_output=True, text=True).stdout
        files |= {Path(path) for path in re.findall(r"(/\S+)", found)}
    for file in files - {operators}:
        target = root / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.copy(operators, root / "operators.so")
    shutil.copy(recorded, root / "record")
    shutil.copy(HERE / "replay.py", root)
    libraries = ":".join(sorted({str(file.parent) for file in files if ".so" in file.name}))
    (root / "init").write_text(INIT.format(libraries=libraries, python=python))
    (root / "init").chmod(0o755)


def image(linux: Path, root: Path, folder: Path) -> Path:
    """A CD that boots it."""
    disc, iso = folder / "disc", folder / "machine.iso"
    (disc / "isolinux").mkdir(parents=True)
    pack = f"find . | cpio -o -H newc --quiet | gzip -1 > {disc}/initrd.gz"
    subprocess.run(pack, shell=True, cwd=root, check=True)
    shutil.copy(linux, disc / "vmlinuz")
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", disc / "isolinux")
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", disc / "isolinux")
    entry = f"default l\nprompt 0\nlabel l\n kernel /vmlinuz\n append initrd=/initrd.gz {BOOT}\n"
    (disc / "isolinux" / "isolinux.cfg").write_text(entry)
    boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4"]
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(iso), *boot, "-boot-info-table", str(disc)]
    subprocess.run(command, check=True)
    return iso


def emulate(processor: Processor, iso: Path, folder: Path) -> str:
    """What the machine writes until it has repeated everything, or `MOST_SECONDS` are over."""
    serial, settings, begin = folder / "serial.txt", folder / "bochs.txt", folder / "begin.txt"
    settings.write_text(BOCHS.format(model=processor.model, iso=iso, serial=serial))
    begin.write_text("c\n")  # Debian's build starts in its debugger
    terminal, inside = pty.openpty()
    machine = subprocess.Popen(
        ["bochs", "-q", "-f", str(settings), "-rc", str(begin)], stdin=inside, stdout=inside, stderr=subprocess.DEVNULL
    )
    os.set_blocking(terminal, False)
    written, end = "", time.monotonic() + MOST_SECONDS
    try:
        while "all calls repeated" not in written and machine.poll() is None and time.monotonic() < end:
            time.sleep(1)
            try:
                while os.read(terminal, 1 << 16):
                    pass
            except BlockingIOError:
                pass
            text = serial.read_text(errors="replace") if serial.exists() else ""
            print(text[len(written) :], end="", flush=True)
            written = text
    finally:
        machine.kill()
    return written


def main() -> int:
    """Status 1 if a call differs or a machine does not get through."""
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        linux = kernel(Path(scratch))
        for processor in PROCESSORS:
            folder = Path(scratch) / processor.model
            folder.mkdir()
            record(processor, folder / "record")
            file_system(compiled(processor, folder), folder / "record", folder / "root")
            written = emulate(processor, image(linux, folder / "root", folder), folder)
            differences = [float(found) for found in re.findall(r"largest difference (\S+)", written)]
            right = (
                "all calls repeated" in written
                and bool(differences)
                and all(found <= MOST_DIFFERENCE for found in differences)
            )
            print(f"{processor.model}: {'right' if right else 'FAILED'}", flush=True)
            failed = failed or not right
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
