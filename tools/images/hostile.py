"""Images that lie, or are broken: what a tag's layer does is in its name. Each is one gzip layer of a few files unless said
otherwise; `honest` is the one that the others distort.

  honest            what it says
  flipped           one byte of the layer's blob is not what its digest says
  flipped-plain     the same with a plain tar, in a file's content
  flipped-zstd      the same with zstd
  swapped           the digest's blob is another, well-formed layer of the same length
  short             the blob ends early
  …-whole           what each of these five, and each not-…, should be
  wrong-size        the manifest's size is not the blob's
  wrong-diff-id     the config says another tar
  wrong-manifest    the index names a manifest by a digest that is not its own
  wrong-config      the same for the config
  missing-blob      the layer's blob is not there
  unknown-type      a layer of a media type nobody knows
  foreign           a layer that is somewhere else (Windows' base layers)
  not-gzip          plain bytes under gzip's media type; no lie, since a blob's first bytes say what it is
  not-plain         gzip under plain's media type
  not-zstd          gzip under zstd's media type
  not-gzip-wrong    like not-gzip, and the config says another tar
  bomb-gzip         4 GiB of zeros behind a tar's end, in 4 MiB of gzip
  bomb-zstd         the same in zstd
  bomb-file         a file of 4 GiB of zeros, in gzip
  whiteout-of-dot, whiteout-of-dots, whiteout-of-nothing  whiteouts of `.`, `..` and of the empty name
"""

import gzip
import json
import subprocess
import tarfile
import zlib

from .codings import GZIP, ZSTD, plain
from .layout import LAYER, Layer, digest_of, layer
from .layout import Layout
from .tars import Tar, noise

GIB = 1 << 30


def small(path, seed=1):
    tar = Tar(path)
    tar.dir("data/").file("data/noise", noise(400_000, seed)).file("data/text", "all is well\n" * 5000)
    return tar.done()


def gzipped(path, content):
    path.write_bytes(gzip.compress(content, 6, mtime=0))
    return path


def zero_bomb(path, head, zeros):
    """gzip of `head` and then of `zeros` zero bytes: one member for the head, one for each GiB quarter."""
    engine = zlib.compressobj(9, zlib.DEFLATED, 31)
    member = b"".join(engine.compress(bytes(1 << 20)) for _ in range(256)) + engine.flush()
    with open(path, "wb") as file:
        file.write(gzip.compress(head, 6, mtime=0))
        for _ in range(zeros // (256 << 20)):
            file.write(member)
    return path


def make(top, work):
    layout = Layout(top)
    honest_tar = small(work / "honest.tar")
    honest = layer(gzipped(work / "honest.gz", honest_tar.read_bytes()), GZIP)
    layout.image("honest", [honest])

    def variant(name, content, like=honest, **changes):
        """A layer that says of itself what `like` does, but for the changes, and has this content under a digest that no
        other image uses."""
        blob = work / f"{name}.blob"
        blob.write_bytes(content)
        said = {**like.__dict__, "blob": blob, **changes}
        return Layer(**said)

    def own(name, media_type, tar_seed, encode):
        """A layer of its own, so that damage to its blob is nobody else's."""
        tar = small(work / f"{name}.tar", tar_seed)
        blob = work / f"{name}.whole"
        blob.write_bytes(encode(tar.read_bytes()))
        return layer(blob, media_type)

    def whole(name, media_type):
        tar = work / f"{name}.tar"
        if media_type != LAYER:
            return plain(tar, work)
        return layer(gzipped(work / f"{name}.tar.gz", tar.read_bytes()), GZIP)

    def flip(content, at):
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    compress = lambda content: gzip.compress(content, 6, mtime=0)
    zstd = lambda content: subprocess.run(["zstd", "-qc", "-3"], input=content, stdout=subprocess.PIPE, check=True).stdout

    for seed, (name, media_type, encode) in enumerate(
        (("flipped", GZIP, compress), ("flipped-plain", LAYER, bytes), ("flipped-zstd", ZSTD, zstd)), 2
    ):
        one = own(name, media_type, seed, encode)
        layout.image(name, [variant(name, flip(one.blob.read_bytes(), 200_000), one)])
        # The same files, so that what is right is known; coded otherwise, or the damaged blob would have its digest.
        layout.image(f"{name}-whole", [whole(name, media_type)])
    one, other = own("swapped", LAYER, 5, bytes), small(work / "other.tar", 6)
    layout.image("swapped-whole", [whole("swapped", LAYER)])
    layout.image("swapped", [variant("swapped", other.read_bytes(), one)])
    one = own("short", GZIP, 7, compress)
    layout.image("short", [variant("short", one.blob.read_bytes()[:-5000], one)])
    layout.image("short-whole", [whole("short", GZIP)])
    one = own("wrong-size", GZIP, 8, compress)
    layout.image("wrong-size", [variant("wrong-size", one.blob.read_bytes(), one, size=one.size + 1)])
    layout.image("wrong-diff-id", [variant("wrong-diff-id", honest.blob.read_bytes(), diff_id=digest_of(other))])
    one = own("missing-blob", GZIP, 9, compress)
    layout.image("missing-blob", [one])
    layout.path(one.digest).unlink()
    unsaid = digest_of(other)
    unknown = "application/vnd.test.layer.v1.tar+brotli"
    layout.image("unknown-type", [variant("unknown-type", honest.blob.read_bytes(), media_type=unknown)])
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    elsewhere = gzipped(work / "elsewhere.gz", small(work / "elsewhere.tar", 13).read_bytes())
    layout.image(
        "foreign",
        [honest],
        descriptors=[
            {
                "mediaType": foreign, "digest": digest_of(elsewhere), "size": elsewhere.stat().st_size,
                "urls": ["https://layers.test.invalid/base"],
            },
        ],
    )
    for seed, (name, media_type, encode) in enumerate(
        (("not-gzip", GZIP, bytes), ("not-plain", LAYER, compress), ("not-zstd", ZSTD, compress)), 14
    ):
        one = own(name, LAYER if encode is bytes else GZIP, seed, encode)
        layout.image(name, [variant(name, one.blob.read_bytes(), one, media_type=media_type)])
        layout.image(f"{name}-whole", [one])
        if name == "not-gzip":
            layout.image("not-gzip-wrong", [variant(name, one.blob.read_bytes(), one, media_type=media_type, diff_id=unsaid)])

    # A digest that is well-formed, and nothing's.
    for name in ("wrong-manifest", "wrong-config"):
        descriptor = layout.manifest([own(name, GZIP, 10 if name == "wrong-config" else 11, compress)])
        path = layout.path(descriptor["digest"])
        if name == "wrong-manifest":
            path.write_bytes(path.read_bytes().replace(b'"schemaVersion": 2', b'"schemaVersion":  2'))
        else:
            config = layout.path(json.loads(path.read_bytes())["config"]["digest"])
            config.write_bytes(config.read_bytes().replace(b'"/bin/sh"', b'"/bin/ex"'))
        layout.tag(name, descriptor)

    end = bytes(1024)
    tar = small(work / "bomb.tar", 12).read_bytes().rstrip(b"\0")
    tar += bytes(-len(tar) % 512) + end
    layout.image("bomb-gzip", [layer(zero_bomb(work / "bomb.gz", tar, 4 * GIB), GZIP, diff_id=unsaid)])
    with open(work / "bomb.zst", "wb") as file:
        file.write(zstd(tar))
        # One frame of a GiB, four times.
        zeros = subprocess.run(
            ["sh", "-c", f"head -c {GIB} /dev/zero | zstd -qc -3"], stdout=subprocess.PIPE, check=True
        ).stdout
        file.write(zeros * 4)
    layout.image("bomb-zstd", [layer(work / "bomb.zst", ZSTD, diff_id=unsaid)])
    info = tarfile.TarInfo("zeros")
    info.size, info.mode = 4 * GIB, 0o644
    layout.image("bomb-file", [layer(zero_bomb(work / "big.gz", info.tobuf(), 4 * GIB), GZIP, diff_id=unsaid)])

    for name, whiteout in (
        ("whiteout-of-nothing", "data/.wh."), ("whiteout-of-dot", "data/.wh.."), ("whiteout-of-dots", "data/.wh..."),
    ):
        tar = Tar(work / f"{name}.tar")
        tar.dir("data/").file(whiteout)
        layout.image(name, [plain(small(work / f"{name}-lower.tar", 20), work), plain(tar.done(), work)])
