"""Tiny images, one for each thing that a layer can do to the layers below: whiteouts as the image-spec's layer.md has them,
and where programs that unpack have been wrong or differ. A case is (name, what it is about, a function for each layer)."""

TIME = 1_600_000_000


def base(tar):
    """A lower layer with some of everything."""
    tar.dir("a/", mode=0o750, owner=(7, 8), mtime=TIME, xattrs={"user.lower": b"1"})
    tar.file("a/one", "1\n").file("a/two", "2\n").dir("a/sub/", mode=0o700).file("a/sub/three", "3\n")
    tar.dir("a/sub/deep/").file("a/sub/deep/four", "4\n")
    tar.file("file", "file\n").symlink("link", "a").symlink("dangling", "nowhere")
    return tar.dir("b/").file("b/x", "x\n").link("b/y", "b/x")


KINDS = ("file", "dir", "symlink", "hardlink", "fifo", "device")


def put(tar, kind, name, text):
    """Something of a kind under a name; a directory with something in it."""
    match kind:
        case "file":
            tar.file(name, text)
        case "dir":
            tar.dir(name + "/").file(f"{name}/in-{text}", text)
        case "symlink":
            tar.symlink(name, text)
        case "hardlink":
            tar.file(f"{text}-of-{name.replace('/', '-')}", text).link(name, f"{text}-of-{name.replace('/', '-')}")
        case "fifo":
            tar.fifo(name)
        case "device":
            tar.device(name, 1, 3 if text == "lower" else 5)


def every_kind(tar):
    tar.dir("d/")
    for below in KINDS:
        for above in KINDS:
            put(tar, below, f"d/{below}-{above}", "lower")
    return tar


def over_every_kind(tar):
    for below in KINDS:
        for above in KINDS:
            put(tar, above, f"d/{below}-{above}", "upper")
    return tar


def gone_every_kind(tar):
    for below in KINDS:
        for above in KINDS:
            tar.whiteout(f"d/{below}-{above}")
    return tar


def merged_usr(tar):
    tar.dir("usr/").dir("usr/bin/").dir("usr/lib/").dir("run/").dir("var/").dir("usr/share/").dir("usr/share/doc/")
    tar.file("usr/bin/sh", "sh\n", mode=0o755).file("usr/lib/so", "so\n").file("usr/share/doc/text", "text\n")
    tar.symlink("bin", "usr/bin").symlink("lib", "/usr/lib").symlink("var/run", "/run").symlink("var/up", "../usr/share")
    return tar.symlink("loop", "loop").symlink("outside", "../../../usr/lib").symlink("chain", "var/up/doc")


CASES = [
    ("nothing", "a second layer without entries", base, lambda t: t),
    ("file", "a file is removed", base, lambda t: t.whiteout("a/one")),
    ("file-at-root", "a file of the root is removed", base, lambda t: t.whiteout("file")),
    ("dir", "a directory is removed with all it holds", base, lambda t: t.whiteout("a/sub")),
    ("dir-entry", "the parents of a whiteout are in the layer too", base, lambda t: t.dir("a/", mtime=5).whiteout("a/one")),
    ("link", "a symbolic link is removed, not what it leads to", base, lambda t: t.whiteout("link").whiteout("dangling")),
    ("one-of-two-links", "one name of a file is removed", base, lambda t: t.whiteout("b/x")),
    ("missing", "something is removed that is not there", base, lambda t: t.whiteout("a/none").whiteout("none")),
    ("missing-parent", "something is removed from a directory that is not there", base, lambda t: t.whiteout("none/x")),
    ("recreated", "removed, then there again, as a file and as a directory", base,
     lambda t: t.whiteout("a/one").file("a/one", "new\n").whiteout("a/sub").dir("a/sub/").file("a/sub/new", "new\n")),
    ("twice", "removed by one layer, there again in the next, removed by a third", base,
     lambda t: t.whiteout("a/one").whiteout("a/sub"),
     lambda t: t.file("a/one", "second\n").dir("a/sub/", mode=0o711).file("a/sub/new", "new\n"), lambda t: t.whiteout("a/one")),
    ("opaque", "a directory's lower content is gone", base, lambda t: t.dir("a/").opaque("a").file("a/new", "new\n")),
    ("opaque-last", "the same, with the mark behind what is new", base,
     lambda t: t.dir("a/").file("a/new", "new\n").dir("a/sub/").file("a/sub/new", "new\n").opaque("a")),
    ("opaque-alone", "the mark without the directory's own entry keeps its attributes", base, lambda t: t.opaque("a")),
    ("opaque-nested", "a directory in an opaque one is made anew", base,
     lambda t: t.opaque("a").dir("a/sub/", mode=0o711).file("a/sub/new", "new\n")),
    ("opaque-inner", "an opaque directory in one that is not", base, lambda t: t.opaque("a/sub").file("a/sub/new", "new\n")),
    ("opaque-same-names", "what was there is there again", base,
     lambda t: t.opaque("a").file("a/one", "new one\n").link("a/two", "a/one")),
    ("opaque-new", "the mark in a directory that no lower layer has", base, lambda t: t.dir("n/").opaque("n").file("n/x", "x\n")),
    ("opaque-root", "the mark in the root", base, lambda t: t.opaque("").file("new", "new\n")),
    ("opaque-and-whiteout", "both in one directory", base, lambda t: t.opaque("a").whiteout("a/one").file("a/two", "new\n")),
    ("opaque-twice", "opaque in two layers", base, lambda t: t.opaque("a").file("a/second", "2\n"),
     lambda t: t.opaque("a").file("a/third", "3\n")),
    ("opaque-file", "the mark under a name that is a file below", base, lambda t: t.dir("file/").opaque("file").file("file/x", "x\n")),
    ("opaque-then-merged", "a third layer adds to what the second made opaque", base,
     lambda t: t.dir("a/", mode=0o711).opaque("a").file("a/new", "new\n"), lambda t: t.file("a/sub/three", "third\n")),
    ("dir-over-whiteout", "a directory made anew does not show what was in the old one", base,
     lambda t: t.whiteout("a"), lambda t: t.dir("a/", mode=0o700).file("a/new", "new\n")),
    ("types", "every kind of thing over every kind of thing", every_kind, over_every_kind),
    ("types-gone", "every kind of thing removed", every_kind, gone_every_kind),
    ("types-thrice", "three layers of them", every_kind, over_every_kind, gone_every_kind, every_kind),
    ("dir-over-link-to-dir", "a directory replaces a link to one", base, lambda t: t.dir("link/").file("link/new", "new\n")),
    ("link-over-dir", "a link replaces a directory that holds something", base, lambda t: t.symlink("a", "b")),
    ("hard-link-down", "hard links to a lower layer's file", base,
     lambda t: t.link("new", "file").link("b/z", "b/x").link("z", "b/y")),
    ("hard-link-replaced", "one of a file's names is replaced, the other keeps the old content", base,
     lambda t: t.file("b/x", "new x\n")),
    ("hard-link-to-new", "a hard link to a name that this layer replaced before", base,
     lambda t: t.file("b/x", "new x\n").link("n", "b/x").link("o", "b/y")),
    ("hard-link-over-itself", "a layer repeats a hard link that is there", base, lambda t: t.file("b/x", "x\n").link("b/y", "b/x")),
    ("hard-link-to-link", "a hard link to a symbolic link", base, lambda t: t.link("new", "link")),
    ("hard-link-target-gone", "a link is made, then its target removed by the next layer", base,
     lambda t: t.link("new", "file"), lambda t: t.whiteout("file")),
    ("attributes", "a repeated directory changes mode, owner and time", base,
     lambda t: t.dir("a/", mode=0o2711, owner=(9, 10), mtime=77).dir("a/sub/", mtime=78)),
    ("attributes-of-root", "the root's own entry", lambda t: base(t.dir("./", mode=0o711, owner=(3, 4), mtime=5)),
     lambda t: t.dir("./", mode=0o750, owner=(1, 2), mtime=6, xattrs={"user.root": b"r"})),
    ("xattrs", "a repeated file has its new attributes only", lambda t: base(t).file("f", "1", xattrs={"user.old": b"1"}),
     lambda t: t.file("f", "2", xattrs={"user.new": b"2"}).file("a/one", "1\n", xattrs={"user.added": b"3"})),
    ("missing-parents", "directories that no layer has an entry for", base,
     lambda t: t.file("m/n/o", "o\n").file("a/p/q", "q\n").file("a/sub/r", "r\n")),
    ("parents-later", "a directory's own entry comes after what it holds", base,
     lambda t: t.file("m/n/o", "o\n").dir("m/n/", mode=0o700, mtime=9).dir("m/", mode=0o711, mtime=8)),
    ("through-links", "names that lead through symbolic links", merged_usr,
     lambda t: t.file("bin/new", "new\n").file("lib/new", "new\n").file("var/run/new", "new\n").file("var/up/new", "new\n")
     .file("chain/new", "new\n").link("bin/ls", "bin/sh")),
    ("whiteouts-through-links", "whiteouts whose names lead through symbolic links", merged_usr,
     lambda t: t.whiteout("bin/sh").whiteout("lib/so").opaque("var/up")),
    ("out-of-the-root", "a link that leads above the root leads to the root", merged_usr,
     lambda t: t.file("outside/new", "new\n").whiteout("outside/so")),
    ("dots", "names with dots and slashes", base,
     lambda t: t.file("./a/./new", "new\n").file("/abs", "abs\n").file("a/sub/../back", "back\n").whiteout("./a/one")),
    ("aufs", "what AUFS leaves in layers is passed over", base,
     lambda t: t.file(".wh..wh.aufs", "").dir(".wh..wh.plnk/", mode=0o700).dir(".wh..wh.orph/", mode=0o700).file("new", "n\n")),
    ("odd-names", "whiteouts of names that look like something else", lambda t: base(t).file("a/.hidden", "h").file("a/wh.x", "x")
     .file("a/ sp ace", "s").file("a/\u00fcml", "u").file("a/" + "l" * 250, "l"),
     lambda t: t.whiteout("a/.hidden").whiteout("a/wh.x").whiteout("a/ sp ace").whiteout("a/\u00fcml")),
    ("many-layers", "a name that changes in each of twelve layers", base,
     *[lambda t, n=n: (t.file("a/one", f"{n}\n") if n % 3 else t.whiteout("a/one")).file(f"a/n{n}", "n") for n in range(11)]),
]
