package extension_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"keyfleet.dev/keyfleet/api/extension"
)

const documentedStatus = `[{"status":{"code":0,"formattedMessage":{"lang":"en","message":"Successfully started Key Vault extension service. 2021-03-03T23:12:23Z"},"operation":"Service start.","status":"success"},"timestampUTC":"2021-03-03T23:12:23Z","version":"1.0"}]`

func TestStatusFileIsTheDocumentedOne(t *testing.T) {
	s := extension.StatusFile{
		Status:       extension.Status{Operation: "Service start.", Status: "success", FormattedMessage: extension.FormattedMessage{Message: "Successfully started Key Vault extension service. 2021-03-03T23:12:23Z"}},
		TimestampUTC: "2021-03-03T23:12:23Z",
	}
	if d := cmp.Diff(documentedStatus, string(s.Encode())); d != "" {
		t.Error(d)
	}
	back, err := extension.ParseStatusFile([]byte(documentedStatus))
	if err != nil || back.Version != "1.0" || !back.Time().Equal(time.Date(2021, 3, 3, 23, 12, 23, 0, time.UTC)) {
		t.Errorf("%+v, %v", back, err)
	}
}

func TestStatusFilesOfOtherHandlers(t *testing.T) {
	cases := []struct {
		why, data string
		want      extension.Status
		fails     bool
	}{
		{
			why: "numbers as version, null substatus, another time form", data: "\xef\xbb\xbf" + `[{"version":1.0,"timestampUTC":"2021-03-03T23:12:23.1234567","status":{"name":"x","operation":"Enable","status":"transitioning","substatus":null,"formattedMessage":{"lang":"en-US","message":"m"}}}, "ignored"]`,
			want: extension.Status{Name: "x", Operation: "Enable", Status: "transitioning", FormattedMessage: extension.FormattedMessage{Lang: "en-US", Message: "m"}},
		},
		{why: "a status word nobody knows is an error", data: `[{"status":{"status":"great","code":"7"}}]`, want: extension.Status{Status: "error", Code: 7}},
		{
			why: "casing is forgiven", data: `[{"status":{"status":"Success","substatus":[{"name":"a","status":"odd","code":null}]}}]`,
			want: extension.Status{Status: "success", Substatus: []extension.Substatus{{Name: "a", Status: "error"}}},
		},
		{why: "no status", data: `[{"version":"1.0"}]`, fails: true},
		{why: "half a file", data: `[{"status":{"sta`, fails: true},
		{why: "an empty array", data: `[]`, fails: true},
		{why: "an empty file", data: ``, fails: true},
		{why: "an object", data: `{"status":{}}`, fails: true},
	}
	for _, c := range cases {
		got, err := extension.ParseStatusFile([]byte(c.data))
		if (err != nil) != c.fails {
			t.Errorf("%s: %v", c.why, err)
		} else if d := cmp.Diff(c.want, got.Status); !c.fails && d != "" {
			t.Errorf("%s: %s", c.why, d)
		}
	}
}

func TestLargeStatusFilesAreCut(t *testing.T) {
	s := extension.StatusFile{Status: extension.Status{Status: "success", FormattedMessage: extension.FormattedMessage{Message: strings.Repeat("é", 70<<10)}}}
	s.Status.Substatus = []extension.Substatus{{Name: "n", Status: "success", FormattedMessage: extension.FormattedMessage{Message: strings.Repeat("y", 20<<10)}}}
	got, err := extension.ParseStatusFile(s.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if n, m := len(got.Status.FormattedMessage.Message), len(got.Status.Substatus[0].FormattedMessage.Message); n != 1<<10 || m != 10<<10 {
		t.Errorf("message %d, substatus %d bytes", n, m)
	}
}

func TestHandlerEnvironmentIsWrittenAsShimsReadIt(t *testing.T) {
	e := extension.HandlerEnvironment{Folders: extension.Folders{
		LogFolder: `/var/log/azure/a, b: "c"`, ConfigFolder: "/lib/config", StatusFolder: "/lib/status", HeartbeatFile: "/lib/heartbeat.log", EventsFolder: "/var/log/azure/a/events",
	}}
	got := string(e.Encode())
	want := `[{"version": 1.0, "handlerEnvironment": {"logFolder": "/var/log/azure/a, b: \"c\"", "configFolder": "/lib/config", "statusFolder": "/lib/status", "heartbeatFile": "/lib/heartbeat.log", "eventsFolder": "/var/log/azure/a/events"}}]`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	// What the custom script extension's shim does: text between `logFolder": "` and `",`.
	_, after, ok := strings.Cut(got, `logFolder": "`)
	folder, _, end := strings.Cut(after, `",`)
	if !ok || !end || strings.Contains(folder, "handlerEnvironment") {
		t.Errorf("a shim would read %q", folder)
	}
	back, err := extension.ParseHandlerEnvironment([]byte(got))
	if err != nil || back.Folders != e.Folders {
		t.Errorf("%+v, %v", back, err)
	}
}

func TestHandlerSettings(t *testing.T) {
	if got := string(extension.HandlerSettings{}.Encode()); got != `{"runtimeSettings":[{"handlerSettings":{"publicSettings":null,"protectedSettings":null,"protectedSettingsCertThumbprint":null}}]}` {
		t.Errorf("all keys are always written: %s", got)
	}
	protected := "MII="
	s := extension.HandlerSettings{PublicSettings: json.RawMessage(`{"a":"<&>"}`), ProtectedSettings: &protected}
	back, err := extension.ParseHandlerSettings(s.Encode())
	if err != nil || string(back.PublicSettings) != `{"a":"<&>"}` || *back.ProtectedSettings != protected || back.ProtectedSettingsCertThumbprint != nil {
		t.Errorf("%+v, %v", back, err)
	}
	if empty, err := extension.ParseHandlerSettings([]byte(" \n")); err != nil || empty.PublicSettings != nil {
		t.Errorf("an empty file is no settings: %+v, %v", empty, err)
	}
}

func TestHandlerManifest(t *testing.T) {
	const commands = `"installCommand":"i","uninstallCommand":"u","updateCommand":"p","enableCommand":"e","disableCommand":"d"`
	m, err := extension.ParseHandlerManifest([]byte(`[{"name":"x","version":1.0,"handlerManifest":{` + commands + `,"rebootAfterInstall":"false","reportHeartbeat":true,"supportsMultipleExtensions":"true","updateMode":"UpdateWithoutInstall"},"resourceLimits":{"services":[{"name":"s"}]}}]`))
	if err != nil || !bool(m.HandlerManifest.SupportsMultipleExtensions) || bool(m.HandlerManifest.RebootAfterInstall) || m.HandlerManifest.UpdatesWithInstall() {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := extension.ParseHandlerManifest([]byte(`[{"handlerManifest":{"installCommand":"i"}}]`)); err == nil || !strings.Contains(err.Error(), "uninstallCommand") {
		t.Errorf("a manifest without commands: %v", err)
	}
}

func TestHeartbeat(t *testing.T) {
	h := extension.Heartbeat{Status: "ready", Message: "ok"}
	back, err := extension.ParseHeartbeat(extension.EncodeHeartbeat(h))
	if err != nil || back != h {
		t.Errorf("%+v, %v", back, err)
	}
	other, err := extension.ParseHeartbeat([]byte(`[{"version":1.0,"heartbeat":{"status":"notready","code":1,"formattedMessage":{"lang":"en","message":"m"}}}]`))
	if err != nil || other.Message != "m" || other.Code != 1 {
		t.Errorf("%+v, %v", other, err)
	}
}

func TestHintLines(t *testing.T) {
	d := extension.Delivery{Secret: "https://v/secrets/a", Version: "8f", Path: "/p", Since: time.Unix(1.7e9, 0).UTC()}
	line := extension.EncodeDelivery(d)
	if back, err := extension.ParseDelivery(line); err != nil || back != d || strings.Count(string(line), "\n") != 1 {
		t.Errorf("%+v, %v", back, err)
	}
	for line, want := range map[string]string{"hint 7:abc": "7:abc", "hint x\r": "x", "hint ": "", "hello": "", "": ""} {
		if got, ok := extension.ParseHint(line); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", line, got, ok)
		}
	}
}

func FuzzHandlerFiles(f *testing.F) {
	f.Add([]byte(documentedStatus))
	f.Add([]byte(`[{"version": 1.0, "handlerEnvironment": {"logFolder": "/l", "configFolder": "/c", "statusFolder": "/s", "heartbeatFile": "/h"}}]`))
	f.Add([]byte(`{"runtimeSettings":[{"handlerSettings":{"publicSettings":{},"protectedSettings":null,"protectedSettingsCertThumbprint":null}}]}`))
	f.Add([]byte(`[{"version":1.0,"heartbeat":{"status":"ready","code":0,"Message":""}}]`))
	f.Add([]byte(`{"secret":"https://v/secrets/a","since":"2021-03-03T23:12:23Z"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := extension.ParseStatusFile(data); err == nil {
			if again, err := extension.ParseStatusFile(s.Encode()); err != nil || again.Status.Status != s.Status.Status {
				t.Errorf("%+v does not survive: %v", s, err)
			}
		}
		if e, err := extension.ParseHandlerEnvironment(data); err == nil {
			e.Version = 1
			if again, err := extension.ParseHandlerEnvironment(e.Encode()); err != nil || again.Folders != e.Folders {
				t.Errorf("%+v does not survive: %+v, %v", e, again, err)
			}
		}
		if s, err := extension.ParseHandlerSettings(data); err == nil {
			s.Encode()
		}
		_, _ = extension.ParseHandlerManifest(data)
		_, _ = extension.ParseHeartbeat(data)
		if d, err := extension.ParseDelivery(data); err == nil && d.Secret == "" {
			t.Error("a delivery of nothing")
		}
	})
}
