package azureapi

import (
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/fault"
)

func resourceID(r *Request) (arm.ID, error) {
	id, err := arm.ParseID(strings.TrimRight(r.URL.Path, "/"))
	if err != nil {
		return id, fault.New(fault.Invalid, "InvalidResourceID", "The path is not a resource id: %s.", err)
	}
	return id, nil
}
