"""The tars that become layers: slices of a real Debian root filesystem, a tree that npm made, and entries by hand."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

TIME = 1_700_000_000


class Tar:
    """A tar written entry by entry, the same bytes for the same calls. Owner 0/0, fixed time, PAX where needed."""

    def __init__(self, path):
        self.path = Path(path)
        self.tar = tarfile.open(self.path, "w", format=tarfile.PAX_FORMAT)

    def add(self, name, kind, mode=0o644, content=b"", link="", mtime=TIME, owner=(0, 0), device=(0, 0), xattrs=None):
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.linkname, info.mtime = kind, mode, link, mtime
        info.uid, info.gid = owner
        info.devmajor, info.devminor = device
        info.size = len(content)
        for key, value in (xattrs or {}).items():
            info.pax_headers["SCHILY.xattr." + key] = value.decode("utf-8", "surrogateescape")
        self.tar.addfile(info, io.BytesIO(content))
        return self

    def file(self, name, content=b"", mode=0o644, **more):
        content = content.encode() if isinstance(content, str) else content
        return self.add(name, tarfile.REGTYPE, mode, content, **more)

    def dir(self, name, mode=0o755, **more):
        return self.add(name, tarfile.DIRTYPE, mode, **more)

    def symlink(self, name, target, **more):
        return self.add(name, tarfile.SYMTYPE, 0o777, link=target, **more)

    def link(self, name, target, **more):
        return self.add(name, tarfile.LNKTYPE, link=target, **more)

    def fifo(self, name, **more):
        return self.add(name, tarfile.FIFOTYPE, **more)

    def device(self, name, major, minor, **more):
        return self.add(name, tarfile.CHRTYPE, device=(major, minor), **more)

    def whiteout(self, name):
        head, _, tail = name.rpartition("/")
        return self.file(f"{head}/.wh.{tail}" if head else f".wh.{tail}", mode=0)

    def opaque(self, name):
        return self.file(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq", mode=0)

    def done(self):
        self.tar.close()
        return self.path


def noise(length, seed=1):
    """Bytes that do not compress, the same every time (xorshift)."""
    state, words = seed * 0x9E3779B97F4A7C15 % 2**64 | 1, []
    for _ in range(-(-length // 8)):
        state ^= state << 13 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 7
        state ^= state << 17 & 0xFFFFFFFFFFFFFFFF
        words.append(state.to_bytes(8, "little"))
    return b"".join(words)[:length]


# ------------------------------------------------------------------------------------------------ Debian, sliced


def packages_of(status):
    """dpkg's status file as {package: (its whole paragraph, its fields)}."""
    found = {}
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if "Package" in fields:
            found[fields["Package"]] = (paragraph, fields)
    return found


def closure(packages, roots):
    """The packages, and all that they depend on."""
    provided = {}
    for name, (_, fields) in packages.items():
        for other in fields.get("Provides", "").split(","):
            if words := other.split():
                provided.setdefault(words[0], []).append(name)
    found, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name in packages and name not in found:
            found.add(name)
            fields = packages[name][1]
            for wanted in re.split(r"[,|]", fields.get("Depends", "") + "," + fields.get("Pre-Depends", "")):
                if words := wanted.split():
                    waiting.append(words[0].split(":")[0])
        elif name not in packages:
            waiting += [other for other in provided.get(name, []) if other not in found]
    return found


def debian(source, work):
    """Cuts a Debian root filesystem, which mmdebstrap wrote as one tar, into the layers of which an image would have been
    built: base system, Python, numpy, and the rest. Every entry is the bytes it was; only dpkg's status file is, as it would
    have been, in every layer, with what was installed by then."""
    tar = tarfile.open(source)
    members = tar.getmembers()
    by_name = {member.name: member for member in members}
    packages = packages_of(tar.extractfile(by_name["./var/lib/dpkg/status"]).read().decode())
    essential = [
        name
        for name, (_, fields) in packages.items()
        if fields.get("Essential") == "yes" or fields.get("Priority") == "required"
    ]
    steps = [[*essential, "apt"], ["python3"], ["python3-numpy"], list(packages)]
    number, owner, stages = {}, {}, []
    for step, roots in enumerate(steps):
        before = set(number)
        for name in sorted(closure(packages, roots) - before):
            number[name] = step
        stages.append(set(number))
    for member in members:
        if match := re.fullmatch(r"\./var/lib/dpkg/info/([^:]*?)(?::[a-z0-9]+)?\.list", member.name):
            for line in tar.extractfile(member).read().decode().splitlines():
                owner.setdefault("." + line, number[match[1]])

    def step_of(member):
        """The first layer that has this name: its package's, or for what scripts made, its directory's or source's."""
        name = member.name
        if match := re.fullmatch(r"\./var/lib/dpkg/info/([^:]*?)(?::[a-z0-9]+)?\.[a-z0-9]+", name):
            return number.get(match[1], 0)
        if name in owner:
            return owner[name]
        if match := re.fullmatch(r"(.*)/__pycache__/([^/]*)\.cpython-\d+(?:\.opt-\d)?\.pyc", name):
            return owner.get(f"{match[1]}/{match[2]}.py", owner.get(match[1], 0))
        if name.endswith("/__pycache__"):
            return owner.get(name.rpartition("/")[0], 0)
        if name.startswith("./etc/ssl/certs/"):
            return len(steps) - 1
        # Merged /usr: packages list /bin/x for what is at /usr/bin/x.
        return owner.get(name.replace("./usr/", "./", 1), 0)

    files = [open(work / f"debian-{step}.tar", "wb") for step in range(len(steps))]
    ends = [following.offset for following in members[1:]] + [tar.offset]
    first = {}
    with open(source, "rb") as raw:
        for member, end in zip(members, ends, strict=True):
            step = first[member.name] = step_of(member)
            if member.islnk():
                step = max(step, first[member.linkname])
            raw.seek(member.offset)
            content = raw.read(end - member.offset)
            if member.name == "./var/lib/dpkg/status":
                for step, installed in enumerate(stages):
                    text = "".join(packages[name][0].strip("\n") + "\n\n" for name in packages if name in installed)
                    info = tarfile.TarInfo(member.name)
                    info.mode, info.mtime, info.size = 0o644, int(member.mtime) + step, len(text.encode())
                    files[step].write(info.tobuf(tarfile.GNU_FORMAT) + text.encode())
                    files[step].write(b"\0" * (-info.size % 512))
                continue
            files[step].write(content)
            if member.isdir() and step == 0 and member.name in ("./usr", "./usr/lib", "./var/lib/dpkg", "./etc"):
                # A directory that a later step wrote into is in its layer again.
                for later in files[1:]:
                    later.write(content)
    for file in files:
        file.write(b"\0" * (10240 - file.tell() % 10240 or 10240))
        file.close()
    return [Path(file.name) for file in files]


def application(path):
    """What somebody's own layer does to a distribution's files: most of what the whiteouts' tiny images have one by one,
    here at once and over real directories."""
    tar = Tar(path)
    tar.dir("opt/").dir("opt/app/").file("opt/app/main.py", "import numpy\nprint(numpy.__version__)\n", mode=0o755)
    # Hard links to what lower layers have, and a file of two names of which one is replaced.
    tar.link("opt/app/python", "usr/bin/python3.11").link("opt/app/os.py", "usr/lib/python3.11/os.py")
    tar.file("usr/bin/perl5.36.0", "#!/bin/sh\necho no perl\n", mode=0o755)
    # Names that lead through merged /usr's links, relative and absolute.
    tar.file("bin/app", "#!/bin/sh\nexec python3 /opt/app/main.py\n", mode=0o755)
    tar.file("lib/app/plugin", "plugin\n").whiteout("sbin/nologin")
    tar.file("var/run/app/pid", "1\n").whiteout("var/lock")
    # Gone: a file, a directory with all it holds, and something that never was.
    tar.whiteout("etc/motd").whiteout("usr/share/doc/base-files").whiteout("usr/share/nothing").whiteout("usr/share/man")
    # Opaque: before and after what is new in it.
    tar.dir("etc/apt/", mode=0o700).file("etc/apt/sources.list", "# none\n").opaque("etc/apt")
    tar.dir("usr/share/zoneinfo/").opaque("usr/share/zoneinfo").file("usr/share/zoneinfo/UTC", "TZif2\n")
    # Other types: a directory for a file, a file for a directory, a directory for a link, a link for a directory.
    tar.dir("etc/hostname/").file("etc/hostname/name", "app\n").file("var/mail", "no mail\n")
    tar.dir("usr/bin/awk/", mode=0o711).file("usr/bin/awk/readme", "gone\n").symlink("home", "opt")
    # A repeated directory that changes attributes, a parent that is not there, names of every length.
    tar.dir("srv/", mode=0o2775, owner=(33, 33), xattrs={"user.purpose": b"served"})
    tar.file("var/cache/app/a/b/c", "deep\n", owner=(33, 33), mode=0o4711)
    tar.file("opt/app/" + "n" * 200 + "/" + "m" * 255, "long\n").file("opt/app/übung €", "not ascii\n")
    tar.fifo("opt/app/pipe", mode=0o600).device("opt/app/null", 1, 3, mode=0o666)
    tar.file("opt/app/attributes", "x", xattrs={"user.one": b"1", "user.long": b"l" * 1000})
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    tar.file("opt/app/capable", "x", mode=0o755, xattrs={"security.capability": capability})
    tar.file("opt/app/noise", noise(3_000_001)).file("opt/app/zeros", bytes(2_000_000)).file("opt/app/empty")
    return tar.done()


def settings(path):
    """A last layer of a few small files, as they come from `COPY config /etc`."""
    tar = Tar(path)
    tar.dir("etc/").dir("etc/app/")
    for n in range(20):
        tar.file(f"etc/app/{n:02}.json", json.dumps({"n": n, "text": "setting " * n}))
    return tar.whiteout("opt/app/empty").done()


def tree(top, path, prefix):
    """A directory as a tar: sorted, owner 0/0, one time for all, symbolic links and modes as they are."""
    tar = Tar(path)
    for place, dirs, files in os.walk(top):
        dirs.sort()
        for name in sorted(files + [name for name in dirs if os.path.islink(os.path.join(place, name))]):
            full = os.path.join(place, name)
            inside = os.path.join(prefix, os.path.relpath(full, top))
            if os.path.islink(full):
                tar.symlink(inside, os.readlink(full))
            else:
                tar.file(inside, Path(full).read_bytes(), mode=0o755 if os.access(full, os.X_OK) else 0o644)
        for name in dirs:
            if not os.path.islink(os.path.join(place, name)):
                tar.dir(os.path.join(prefix, os.path.relpath(os.path.join(place, name), top)) + "/")
    return tar.done()
