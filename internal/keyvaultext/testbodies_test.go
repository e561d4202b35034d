package keyvaultext_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// settingsIn returns the settings of the extension in a documented request body.
func settingsIn(t testing.TB, file string) json.RawMessage {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "testdata", "requests", file))
	if err != nil {
		t.Fatal(err)
	}
	var body struct {
		Properties struct {
			DeploymentConfiguration struct {
				VirtualMachineConfiguration struct {
					Extensions []struct{ Settings json.RawMessage }
				}
			}
		}
	}
	if err := json.Unmarshal(data, &body); err != nil {
		t.Fatal(err)
	}
	return body.Properties.DeploymentConfiguration.VirtualMachineConfiguration.Extensions[0].Settings
}
