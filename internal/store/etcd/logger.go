package etcd

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newLogger returns a zap logger that writes warnings and errors to log; while
// quiet is set (nil: never) at debug level.
func newLogger(log *slog.Logger, quiet *atomic.Bool) *zap.Logger {
	return zap.New(&slogCore{log: log.With("part", "etcd"), quiet: quiet})
}

// early are messages of a new etcd that looks for a term in its file before the
// first one is written there; it looks again.
var early = map[string]bool{
	"Failed to detect schema version":  true,
	"failed to update storage version": true,
}

// slogCore is a zapcore.Core on slog.
type slogCore struct {
	log   *slog.Logger
	quiet *atomic.Bool
}

// Enabled implements zapcore.Core. What etcd says at info level is for those
// who run etcd itself.
func (c *slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

// With implements zapcore.Core.
func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log.With(attributes(fields)...), quiet: c.quiet}
}

// Check implements zapcore.Core.
func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	if c.quiet != nil && c.quiet.Load() || early[e.Message] {
		level = slog.LevelDebug
	}
	c.log.Log(context.Background(), level, e.Message, attributes(fields)...)
	return nil
}

// Sync implements zapcore.Core.
func (c *slogCore) Sync() error { return nil }

func attributes(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
	}
	for k, v := range enc.Fields {
		out = append(out, slog.Any(k, v))
	}
	return out
}
