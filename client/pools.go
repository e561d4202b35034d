package client

import (
	"context"
	"net/http"
	"net/url"

	"keyfleet.dev/keyfleet/api/batch"
)

// PutAccount creates a Batch account by its resource id, and waits until it is there.
func (c *Client) PutAccount(ctx context.Context, resourceID, location string) (batch.Account, error) {
	resp, err := c.Do(ctx, Request{Method: http.MethodPut, URL: c.ARM(resourceID), Version: VersionBatch, Body: batch.AccountRequest{Location: location}})
	if err != nil {
		return batch.Account{}, err
	}
	if _, err := c.Wait(ctx, resp, nil); err != nil {
		return batch.Account{}, err
	}
	return call[batch.Account](ctx, c, http.MethodGet, c.ARM(resourceID), VersionBatch, nil)
}

// PutPool creates or changes a pool from its resource body, which is sent byte
// for byte. warnings are the faults of state with which it was accepted.
func (c *Client) PutPool(ctx context.Context, resourceID string, body []byte) (p batch.Pool, warnings []string, err error) {
	resp, err := c.Do(ctx, Request{Method: http.MethodPut, URL: c.ARM(resourceID), Version: VersionBatch, Body: body})
	if err != nil {
		return p, nil, err
	}
	return p, resp.Warnings(), resp.Into(&p)
}

// Pool reads a pool by its resource id.
func (c *Client) Pool(ctx context.Context, resourceID string) (batch.Pool, error) {
	return call[batch.Pool](ctx, c, http.MethodGet, c.ARM(resourceID), VersionBatch, nil)
}

// DeletePool starts the deletion of a pool and waits for its end.
func (c *Client) DeletePool(ctx context.Context, resourceID string) error {
	resp, err := c.Do(ctx, Request{Method: http.MethodDelete, URL: c.ARM(resourceID), Version: VersionBatch})
	if err != nil {
		return err
	}
	_, err = c.Wait(ctx, resp, nil)
	return err
}

// Nodes lists the nodes of a pool; endpoint is the account's accountEndpoint.
func (c *Client) Nodes(ctx context.Context, endpoint, pool string) ([]batch.Node, error) {
	return List[batch.Node](ctx, c, Request{Method: http.MethodGet, URL: c.Batch(endpoint, "/pools/"+url.PathEscape(pool)+"/nodes"), Version: VersionBatchData})
}

// NodeExtension reads an extension of a node with its instance view.
func (c *Client) NodeExtension(ctx context.Context, endpoint, pool, node, extension string) (batch.NodeExtension, error) {
	u := "/pools/" + url.PathEscape(pool) + "/nodes/" + url.PathEscape(node) + "/extensions/" + url.PathEscape(extension)
	return call[batch.NodeExtension](ctx, c, http.MethodGet, c.Batch(endpoint, u), VersionBatchData, nil)
}
