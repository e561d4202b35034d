package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// pollEvery is the pause between looks at an operation where the server names none.
const pollEvery = time.Second

// Wait follows an accepted long operation (201 or 202 with Azure-AsyncOperation
// or Location) to its end and returns the last answer. An answer that is no such
// operation is returned as it is. seen, where set, is told each status.
func (c *Client) Wait(ctx context.Context, resp *Response, seen func(status string)) (*Response, error) {
	if seen == nil {
		seen = func(string) {}
	}
	if u := resp.Header.Get("Azure-AsyncOperation"); u != "" {
		return c.waitOperation(ctx, u, resp, seen)
	}
	if u := resp.Header.Get("Location"); u != "" && resp.Status == http.StatusAccepted {
		return c.waitLocation(ctx, u, resp, seen)
	}
	return resp, nil
}

// operationStatus is the body behind Azure-AsyncOperation.
type operationStatus struct {
	Name   string    `json:"name"`
	Status string    `json:"status"`
	Error  *armError `json:"error"`
}

func (c *Client) waitOperation(ctx context.Context, u string, resp *Response, seen func(string)) (*Response, error) {
	for {
		if err := c.pause(ctx, resp); err != nil {
			return nil, err
		}
		var err error
		if resp, err = c.Do(ctx, Request{Method: http.MethodGet, URL: u}); err != nil {
			return nil, err
		}
		var op operationStatus
		if err := resp.Into(&op); err != nil {
			return nil, err
		}
		seen(op.Status)
		switch strings.ToLower(op.Status) {
		case "succeeded":
			return resp, nil
		case "failed", "canceled", "cancelled":
			e := &Error{Status: http.StatusConflict, Code: "OperationFailed", Operation: "GET " + u, RequestID: resp.Header.Get("x-ms-request-id")}
			e.Message = fmt.Sprintf("The operation ended as %s.", op.Status)
			if op.Error != nil {
				e.Code, e.Message, e.Target, e.Details = op.Error.Code, op.Error.Message, op.Error.Target, op.Error.Details
				e.takeFix()
			}
			return nil, e
		}
	}
}

func (c *Client) waitLocation(ctx context.Context, u string, resp *Response, seen func(string)) (*Response, error) {
	for {
		if err := c.pause(ctx, resp); err != nil {
			return nil, err
		}
		var err error
		if resp, err = c.Do(ctx, Request{Method: http.MethodGet, URL: u}); err != nil {
			return nil, err
		}
		if resp.Status != http.StatusAccepted {
			seen("Succeeded")
			return resp, nil
		}
		seen("InProgress")
		if next := resp.Header.Get("Location"); next != "" {
			u = next // each answer may name the next place to look
		}
	}
}

// pause waits as long as the last answer asks for.
func (c *Client) pause(ctx context.Context, resp *Response) error {
	d := retryAfter(resp.Header)
	if d <= 0 || d > maxRetryAfter {
		d = pollEvery
	}
	return c.cfg.Sleep(ctx, d)
}

// Poll calls look until it reports done or fails, with the pause between. It
// is for states that no operation resource stands for, such as a pool's nodes.
func (c *Client) Poll(ctx context.Context, every time.Duration, look func(ctx context.Context) (done bool, err error)) error {
	for {
		done, err := look(ctx)
		if err == nil && done {
			return nil
		}
		var e *Error
		if err != nil && (!errors.As(err, &e) || e.Status != 0) { // an outage is waited out; a refusal is not
			return err
		}
		if serr := c.cfg.Sleep(ctx, every); serr != nil {
			return serr
		}
	}
}
