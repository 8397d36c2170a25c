"""OCI image layouts: blobs by digest, manifests, configs, tags. Follows the image-spec's image-layout.md, manifest.md and
config.md. Everything is deterministic: the same layers give the same digests."""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
# Every image is of this platform, and says that it was made at this time.
PLATFORM = {"architecture": "amd64", "os": "linux"}
CREATED = "2023-11-14T22:13:20Z"


@dataclass
class Layer:
    """One layer as a blob: a file, and what a manifest and a config say of it."""

    blob: Path
    media_type: str
    digest: str
    size: int
    diff_id: str
    annotations: dict = field(default_factory=dict)

    def descriptor(self):
        found = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = self.annotations
        return found


def digest_of(path, unpacker=None):
    """The SHA-256 of a file, or of what a program (not this one) unpacks it to."""
    state = hashlib.sha256()
    if unpacker is None:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
        return "sha256:" + state.hexdigest()
    with subprocess.Popen([*unpacker, str(path)], stdout=subprocess.PIPE) as process:
        while block := process.stdout.read(1 << 20):
            state.update(block)
    if process.returncode != 0:
        raise SystemExit(f"test-images: {unpacker[0]} cannot unpack {path}")
    return "sha256:" + state.hexdigest()


UNPACKERS = {LAYER: None, LAYER + "+gzip": ["gzip", "-dc"], LAYER + "+zstd": ["zstd", "-qdc"]}


def layer(blob, media_type, annotations=None, diff_id=None):
    """A layer from a file; its diff_id from what gzip(1) or zstd(1) makes of it."""
    return Layer(
        blob,
        media_type,
        digest_of(blob),
        blob.stat().st_size,
        diff_id or digest_of(blob, UNPACKERS[media_type]),
        annotations or {},
    )


class Layout:
    """An OCI image layout that is being written."""

    def __init__(self, top):
        self.top = Path(top)
        self.blobs = self.top / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (self.top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.tags = []

    @staticmethod
    def reader(top):
        """Where a layout that somebody else wrote has a blob."""
        return lambda digest: Path(top) / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def path(self, digest):
        return self.blobs / digest.removeprefix("sha256:")

    def add_bytes(self, content):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.path(digest).write_bytes(content)
        return digest

    def add_file(self, blob, digest):
        """Puts a file under a digest, which need not be its own: tests of lying images want that too."""
        if not self.path(digest).exists():
            try:
                os.link(blob, self.path(digest))
            except OSError:
                shutil.copyfile(blob, self.path(digest))

    def add_json(self, value):
        return self.add_bytes(json.dumps(value, sort_keys=True, indent=1).encode())

    def manifest(self, layers, command=("/bin/sh",), platform=PLATFORM, descriptors=None):
        """Writes an image's blobs, config and manifest; the manifest's descriptor."""
        for part in layers:
            self.add_file(part.blob, part.digest)
        config = {
            **platform,
            "created": CREATED,
            "config": {"Cmd": list(command), "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [part.diff_id for part in layers]},
            "history": [{"created": CREATED, "created_by": f"layer {n}"} for n, _ in enumerate(layers)],
        }
        config_digest = self.add_json(config)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIG,
                "digest": config_digest,
                "size": self.path(config_digest).stat().st_size,
            },
            "layers": descriptors or [part.descriptor() for part in layers],
        }
        digest = self.add_json(manifest)
        return {"mediaType": MANIFEST, "digest": digest, "size": self.path(digest).stat().st_size}

    def tag(self, name, descriptor):
        self.tags.append({**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}})
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.tags}
        (self.top / "index.json").write_text(json.dumps(index, sort_keys=True, indent=1))

    def image(self, name, layers, **options):
        """An image with its tag."""
        descriptor = self.manifest(layers, **options)
        self.tag(name, descriptor)
        return descriptor

    def index(self, name, descriptors):
        """An image index, of several platforms, with its tag."""
        digest = self.add_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": descriptors})
        self.tag(name, {"mediaType": INDEX, "digest": digest, "size": self.path(digest).stat().st_size})
