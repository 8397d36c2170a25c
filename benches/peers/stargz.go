// Makes eStargz layers, and mounts one as stargz-snapshotter does, without containerd: its snapshotter is called in this process.
//
// mount ROOT DIR: says "ready", waits for a line "REFERENCE LAYER-DIGEST TOC-DIGEST" on standard input, mounts the layer's snapshot
// on DIR, says "mounted", and unmounts when standard input ends. ROOT is the snapshotter's directory.
//
// convert TAR OUT [LIST]: makes an eStargz layer of a tar, with the files of LIST (one a line) first and to be fetched at once, and
// prints the digest of its table of contents.
//
// Debian has the snapshotter's library and no daemon: tools/peers builds this with it.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/reference"
	"github.com/containerd/containerd/remotes/docker"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/stargz-snapshotter/estargz"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	snbase "github.com/containerd/stargz-snapshotter/snapshot"
)

func main() {
	var err error
	switch arguments := os.Args[1:]; {
	case len(arguments) == 3 && arguments[0] == "mount":
		err = mountLayer(arguments[1], arguments[2])
	case len(arguments) >= 3 && arguments[0] == "convert":
		err = convert(arguments[1], arguments[2], arguments[3:])
	default:
		err = fmt.Errorf("mount ROOT DIR, or convert TAR OUT [LIST]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func convert(tar, out string, list []string) error {
	file, err := os.Open(tar)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	var options []estargz.Option
	for _, name := range list {
		bytes, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var missing []string
		options = append(options, estargz.WithPrioritizedFiles(strings.Fields(string(bytes))),
			estargz.WithAllowPrioritizeNotFound(&missing))
	}
	blob, err := estargz.Build(io.NewSectionReader(file, 0, info.Size()), options...)
	if err != nil {
		return err
	}
	defer blob.Close()
	to, err := os.Create(out)
	if err != nil {
		return err
	}
	if _, err := io.Copy(to, blob); err != nil {
		return err
	}
	fmt.Println(blob.TOCDigest())
	return to.Close()
}

// The registry of a reference, spoken to by plain HTTP and without a login.
func plain(of reference.Spec) ([]docker.RegistryHost, error) {
	return []docker.RegistryHost{{
		Client:       &http.Client{Transport: http.DefaultTransport},
		Host:         of.Hostname(),
		Scheme:       "http",
		Path:         "/v2",
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
		Authorizer:   docker.NewDockerAuthorizer(),
	}}, nil
}

func mountLayer(root, dir string) error {
	ctx := context.Background()
	// What its daemon does by default, but for the metrics' listener.
	settings := config.Config{NoPrometheus: true}
	filesystem, err := stargzfs.NewFilesystem(filepath.Join(root, "stargz"), settings,
		stargzfs.WithGetSources(source.FromDefaultLabels(plain)))
	if err != nil {
		return err
	}
	snapshotter, err := snbase.NewSnapshotter(ctx, filepath.Join(root, "snapshotter"), filesystem, snbase.AsynchronousRemove)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	if !lines.Scan() {
		return nil
	}
	words := strings.Fields(lines.Text())
	if len(words) != 3 {
		return fmt.Errorf("not a reference and two digests: %q", lines.Text())
	}
	labels := map[string]string{
		"containerd.io/snapshot.ref":                     "layer",
		"containerd.io/snapshot/remote/stargz.reference": words[0],
		"containerd.io/snapshot/remote/stargz.digest":    words[1],
		"containerd.io/snapshot/remote/stargz.layers":    words[1],
		estargz.TOCJSONDigestAnnotation:                  words[2],
	}
	_, err = snapshotter.Prepare(ctx, "prepare", "", snapshots.WithLabels(labels))
	if !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("the layer was not taken as a remote snapshot: %v", err)
	}
	mounts, err := snapshotter.View(ctx, "view", "layer")
	if err != nil {
		return err
	}
	if err := mount.All(mounts, dir); err != nil {
		return err
	}
	fmt.Println("mounted")
	for lines.Scan() {
	}
	if err := mount.UnmountAll(dir, syscall.MNT_DETACH); err != nil {
		return err
	}
	return snapshotter.Close()
}
