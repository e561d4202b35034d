// Command podclient runs in a pod and uses a server again and again: each time it
// logs in anew, writes something small and reads it back, and goes. All that it knows
// of the server it has from the pod's environment, under the names that a service
// connection gives to Go programs; whom it trusts is its image's to say.
//
//	podclient postgres|mysql|redis|rabbitmq         until it is told to end, and a moment longer
//	podclient postgres|mysql|redis|rabbitmq once
//
// After each time it prints who logged in, and how all times so far have ended:
//
//	mysql kf_my_0123456789_a ok=17 refused=0 failed=0
//
// refused are logins that the server did not take; all else that went wrong has
// failed. Why is told in a line of its own. Its last line ends in "stopped". The status
// is 0 whatever came of it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const (
	pause   = 250 * time.Millisecond // between two times
	drain   = 4 * time.Second        // that it works on when it shall end, as servers finish what they have
	timeout = 30 * time.Second       // for one time
)

// service is a server as its application knows it.
type service struct {
	user    string                          // who logs in
	use     func(ctx context.Context) error // logs in, writes, reads back
	refused func(err error) bool            // whether the server did not take the login
}

// tally is how all times have ended.
type tally struct{ ok, refused, failed int }

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func run(args []string) error {
	open := map[string]func() (service, error){"postgres": postgres, "mysql": mysqlServer, "redis": redisServer, "rabbitmq": rabbitmq}
	if len(args) == 0 || len(args) > 2 || open[args[0]] == nil || len(args) == 2 && args[1] != "once" {
		return fmt.Errorf("usage: podclient postgres|mysql|redis|rabbitmq [once]")
	}
	s, err := open[args[0]]()
	if err != nil {
		return err
	}
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	life, end := context.WithCancel(context.Background())
	defer end()
	context.AfterFunc(told, func() { time.AfterFunc(drain, end) })
	for all := (tally{}); ; {
		all.add(args[0], s)
		if len(args) == 2 || life.Err() != nil {
			fmt.Println(args[0], s.user, all, "stopped")
			return nil
		}
		fmt.Println(args[0], s.user, all)
		select {
		case <-time.After(pause):
		case <-life.Done():
		}
	}
}

// add uses the service once.
func (t *tally) add(name string, s service) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	err := s.use(ctx)
	switch {
	case err == nil:
		t.ok++
		return
	case s.refused(err):
		t.refused++
	default:
		t.failed++
	}
	fmt.Printf("%s %s: %v\n", name, s.user, err)
}

func (t tally) String() string {
	return fmt.Sprintf("ok=%d refused=%d failed=%d", t.ok, t.refused, t.failed)
}
