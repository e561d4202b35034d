//go:build linux

package bed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
)

// Image is a container image of one layer.
type Image struct {
	Ref        string            // as pods name it, with a tag or without; the registry's host means nothing
	Files      map[string]string // by path in the image: a file or folder of this machine
	Links      map[string]string // by path in the image: where a symbolic link leads
	Entrypoint []string          // empty: a pod must name a command
}

// PushImage makes the image and pushes it to the bed's registry, from which every
// node pulls. An image with the same name is replaced, as far as nodes have not
// pulled it.
func (c *Cluster) PushImage(ctx context.Context, img Image) error {
	if !c.Services {
		return fmt.Errorf("pushing %s: bed %s has no registry, it was brought up without Services", img.Ref, c.Name)
	}
	if err := c.pushImage(ctx, img); err != nil {
		return fmt.Errorf("pushing %s: %w", img.Ref, err)
	}
	return nil
}

func (c *Cluster) pushImage(ctx context.Context, img Image) error {
	repository, tag, err := splitRef(img.Ref)
	if err != nil {
		return err
	}
	archive, err := os.CreateTemp(c.Dir, "layer-")
	if err != nil {
		return err
	}
	defer os.Remove(archive.Name())
	defer archive.Close()
	sum := sha256.New()
	if err := writeLayer(io.MultiWriter(archive, sum), img.Files, img.Links); err != nil {
		return err
	}
	layerID := hex.EncodeToString(sum.Sum(nil))
	config, err := json.Marshal(imageConfig(img.Entrypoint, layerID))
	if err != nil {
		return err
	}
	transport := &http.Transport{DialContext: c.Dial}
	defer transport.CloseIdleConnections()
	r := registryClient{client: &http.Client{Transport: transport}, base: "http://" + registryAddr + "/v2/" + repository}
	layer, err := r.blob(ctx, "application/vnd.oci.image.layer.v1.tar", archive, "sha256:"+layerID)
	if err != nil {
		return err
	}
	configID := sha256.Sum256(config)
	settings, err := r.blob(ctx, "application/vnd.oci.image.config.v1+json", bytes.NewReader(config), "sha256:"+hex.EncodeToString(configID[:]))
	if err != nil {
		return err
	}
	return r.manifest(ctx, tag, settings, layer)
}

// splitRef takes an image's name apart as containerd does, without the host.
func splitRef(ref string) (repository, tag string, err error) {
	if strings.Contains(ref, "@") {
		return "", "", errors.New("an image is pushed by a tag, not by a digest")
	}
	repository, tag = ref, "latest"
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		repository, tag = ref[:i], ref[i+1:]
	}
	host, rest, found := strings.Cut(repository, "/")
	if found && (host == "localhost" || strings.ContainsAny(host, ".:")) {
		repository = rest
	} else {
		host = "docker.io"
	}
	if repository == "" || tag == "" {
		return "", "", fmt.Errorf("%q is not the name of an image", ref)
	}
	if host == "docker.io" && !strings.Contains(repository, "/") {
		repository = "library/" + repository
	}
	return repository, tag, nil
}

// descriptor names a part of an image in its manifest.
type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

// registryClient pushes to one repository.
type registryClient struct {
	client *http.Client
	base   string
}

// blob uploads in one piece, as the distribution protocol allows.
func (r registryClient) blob(ctx context.Context, mediaType string, content io.ReadSeeker, digest string) (descriptor, error) {
	size, err := content.Seek(0, io.SeekEnd)
	if err != nil {
		return descriptor{}, err
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return descriptor{}, err
	}
	start, err := http.NewRequestWithContext(ctx, http.MethodPost, r.base+"/blobs/uploads/", nil)
	if err != nil {
		return descriptor{}, err
	}
	at, err := r.do(start, http.StatusAccepted)
	if err != nil {
		return descriptor{}, err
	}
	query := at.Query()
	query.Set("digest", digest)
	at.RawQuery = query.Encode()
	put, err := http.NewRequestWithContext(ctx, http.MethodPut, at.String(), io.NopCloser(content))
	if err != nil {
		return descriptor{}, err
	}
	put.ContentLength = size
	put.Header.Set("Content-Type", "application/octet-stream")
	if _, err := r.do(put, http.StatusCreated); err != nil {
		return descriptor{}, err
	}
	return descriptor{mediaType, digest, size}, nil
}

func (r registryClient) manifest(ctx context.Context, tag string, config, layer descriptor) error {
	const mediaType = "application/vnd.oci.image.manifest.v1+json"
	b, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaType, "config": config, "layers": []descriptor{layer},
	})
	if err != nil {
		return err
	}
	put, err := http.NewRequestWithContext(ctx, http.MethodPut, r.base+"/manifests/"+tag, bytes.NewReader(b))
	if err != nil {
		return err
	}
	put.Header.Set("Content-Type", mediaType)
	_, err = r.do(put, http.StatusCreated)
	return err
}

// do sends the request, wants the status, and returns where the answer leads.
func (r registryClient) do(req *http.Request, status int) (*url.URL, error) {
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // for the message only
	if resp.StatusCode != status {
		return nil, fmt.Errorf("%s %s: %s: %s", req.Method, req.URL.Path, resp.Status, body)
	}
	return resp.Location()
}
