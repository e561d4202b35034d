//go:build linux

package bed

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
)

// repository is where kubeadm is told to find its images. There is no such
// registry: the images are in every machine before it asks, and those of the
// add-ons in the registry of a bed with Services.
const (
	repository = "keyfleet.bed/kubernetes"
	pauseImage = repository + "/pause:1"
)

// image is a container image of one static program.
type image struct {
	file       string // in the cache's part
	ref        string
	program    string // also its path in the image: /usr/local/bin/PROGRAM
	entrypoint bool   // whether a container without a command runs the program
}

func allImages() []image {
	list := []image{
		{"pause.tar", pauseImage, "pause", true},
		{"etcd.tar", repository + "/etcd:" + etcdVersion, "etcd", false},
	}
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler"} {
		list = append(list, image{name + ".tar", repository + "/" + name + ":" + kubernetesVersion, name, false})
	}
	return list
}

func imagesKey(source, programs string) (string, error) {
	pause, err := os.ReadFile(filepath.Join(source, "pause", "main.go"))
	if err != nil {
		return "", fmt.Errorf("reading the pause program: %w", err)
	}
	return key(programs, string(pause), fmt.Sprint(allImages())), nil
}

func (c *Cache) buildImages(ctx context.Context, dir string, _ io.Writer) error {
	pause := filepath.Join(filepath.Dir(dir), "pause")
	if err := goBuild(ctx, filepath.Dir(filepath.Dir(c.source)), pause, "-s -w", "./test/bed/pause"); err != nil {
		return err
	}
	for _, i := range allImages() {
		binary := filepath.Join(c.path(programs), i.program)
		if i.program == "pause" {
			binary = pause
		}
		if err := writeImage(filepath.Join(dir, i.file), i, binary); err != nil {
			return fmt.Errorf("making the image of %s: %w", i.program, err)
		}
	}
	return nil
}

// writeImage writes an archive as docker save makes it: one layer, a
// configuration, a manifest that names both.
func writeImage(out string, i image, binary string) error {
	layer, err := os.Create(out + ".layer")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	digest := sha256.New()
	at := "/usr/local/bin/" + i.program
	if err := writeLayer(io.MultiWriter(layer, digest), map[string]string{at: binary}, nil); err != nil {
		return err
	}
	layerID := hex.EncodeToString(digest.Sum(nil))
	var entrypoint []string
	if i.entrypoint {
		entrypoint = []string{at}
	}
	config, err := json.Marshal(imageConfig(entrypoint, layerID))
	if err != nil {
		return err
	}
	configID := sha256.Sum256(config)
	configName := hex.EncodeToString(configID[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{i.ref}, "Layers": []string{layerID + ".tar"},
	}})
	if err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for name, b := range map[string][]byte{"manifest.json": manifest, configName: config} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	if err := addFile(w, layerID+".tar", layer.Name(), 0o644); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return f.Close()
}

func imageConfig(entrypoint []string, layerID string) any {
	config := map[string]any{"Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}}
	if len(entrypoint) > 0 {
		config["Entrypoint"] = entrypoint
	}
	return map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": config,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + layerID}},
	}
}
