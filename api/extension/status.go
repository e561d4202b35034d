package extension

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// The words of status files.
const (
	StatusTransitioning = "transitioning"
	StatusWarning       = "warning"
	StatusError         = "error"
	StatusSuccess       = "success"
)

// Limits of a status file: a longer file keeps its meaning, its messages are cut.
const (
	MaxStatusFile    = 128 << 10 // bytes
	cutMessage       = 1 << 10
	cutSubstatusText = 10 << 10
)

// StatusFile is the first element of a status file; the rest never counts. The
// order of members is that of the Key Vault extension's own file, so that
// encoding one gives the documented bytes.
type StatusFile struct {
	Status       Status  `json:"status"`
	TimestampUTC string  `json:"timestampUTC"` // RFC 3339; handlers in the field write other forms too
	Version      Version `json:"version"`
}

// Status is the handler's answer to an operation.
type Status struct {
	Code                     Code             `json:"code"`
	ConfigurationAppliedTime string           `json:"configurationAppliedTime,omitempty"`
	FormattedMessage         FormattedMessage `json:"formattedMessage"`
	Name                     string           `json:"name,omitempty"`
	Operation                string           `json:"operation"`
	Status                   string           `json:"status"` // transitioning, warning, error, success
	Substatus                []Substatus      `json:"substatus,omitempty"`
}

// FormattedMessage is a message in a language.
type FormattedMessage struct {
	Lang    string `json:"lang"`
	Message string `json:"message"`
}

// Substatus is the state of one part of the operation.
type Substatus struct {
	Code             Code             `json:"code"`
	FormattedMessage FormattedMessage `json:"formattedMessage"`
	Name             string           `json:"name"`
	Status           string           `json:"status"`
}

// Code is a status code: a number, which some handlers write as a string.
type Code int

// UnmarshalJSON accepts a number, a numeric string, or null for 0.
func (c *Code) UnmarshalJSON(data []byte) error {
	text := strings.Trim(string(data), `"`)
	if text == "" || text == "null" {
		*c = 0
		return nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return fmt.Errorf("status code %.40s is not a whole number", data)
	}
	*c = Code(n)
	return nil
}

// Encode renders the status file on one line. The version is written as a
// string, "1.0" if it is empty.
func (s StatusFile) Encode() []byte {
	if s.Version == "" {
		s.Version = "1.0"
	}
	if s.Status.FormattedMessage.Lang == "" {
		s.Status.FormattedMessage.Lang = "en"
	}
	return mustJSON([]StatusFile{s})
}

// Time returns timestampUTC, or the zero time if it cannot be read.
func (s StatusFile) Time() time.Time {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02 15:04:05.999999999", "20060102T150405Z"} {
		if t, err := time.Parse(layout, s.TimestampUTC); err == nil {
			return t.UTC()
		}
	}
	return time.Time{}
}

// ParseStatusFile reads a status file. A status word that the contract does
// not know counts as error; of a file over MaxStatusFile the messages are cut.
func ParseStatusFile(data []byte) (StatusFile, error) {
	var all []json.RawMessage
	if err := json.Unmarshal(trimBOM(data), &all); err != nil {
		return StatusFile{}, fmt.Errorf("reading status file: %w", err)
	}
	if len(all) == 0 {
		return StatusFile{}, errors.New("reading status file: the array is empty")
	}
	var s StatusFile
	if err := json.Unmarshal(all[0], &s); err != nil {
		return StatusFile{}, fmt.Errorf("reading status file: %w", err)
	}
	if s.Status.Status == "" {
		return StatusFile{}, errors.New("reading status file: status.status is missing")
	}
	s.Status.Status = statusWord(s.Status.Status)
	for i := range s.Status.Substatus {
		s.Status.Substatus[i].Status = statusWord(s.Status.Substatus[i].Status)
	}
	if len(data) > MaxStatusFile {
		s.cut()
	}
	return s, nil
}

func (s *StatusFile) cut() {
	s.Status.FormattedMessage.Message = head(s.Status.FormattedMessage.Message, cutMessage)
	for i := range s.Status.Substatus {
		sub := &s.Status.Substatus[i]
		sub.FormattedMessage.Message = head(sub.FormattedMessage.Message, cutSubstatusText)
		sub.Name = head(sub.Name, cutSubstatusText)
	}
}

// head returns at most n bytes of text, whole characters only.
func head(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "")
}

func statusWord(word string) string {
	switch w := strings.ToLower(word); w {
	case StatusTransitioning, StatusWarning, StatusError, StatusSuccess:
		return w
	}
	return StatusError
}
