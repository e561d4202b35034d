package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"keyfleet.dev/keyfleet/internal/effect"
)

// bindIMDS listens on the identity endpoint's address, and puts it on the
// loopback device first if that is wished and the machine does not have it.
func bindIMDS(cfg Config) (net.Listener, error) {
	l, err := net.Listen("tcp4", cfg.IMDS)
	if err == nil || !cfg.ClaimIMDS || !errors.Is(err, unix.EADDRNOTAVAIL) {
		return l, explainIMDS(cfg, err)
	}
	if cloud := cloudVendor(); cloud != "" {
		return nil, fmt.Errorf("the address %s belongs to the metadata service of this machine's cloud (%s); "+
			"use --imds 127.0.0.1:40342 and set msiEndpoint to http://localhost:40342/metadata/identity", cfg.IMDS, cloud)
	}
	ap, err := netip.ParseAddrPort(cfg.IMDS)
	if err != nil {
		return nil, fmt.Errorf("the identity endpoint %q is not IP:PORT", cfg.IMDS)
	}
	if err := effect.Do("claim identity address", func() error { return addToLoopback(ap.Addr()) }); err != nil {
		return nil, fmt.Errorf("putting %s on the loopback device (this needs root): %w", ap.Addr(), err)
	}
	l, err = net.Listen("tcp4", cfg.IMDS)
	return l, explainIMDS(cfg, err)
}

func explainIMDS(cfg Config, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("opening the identity endpoint on %s: %w", cfg.IMDS, err)
}

// addToLoopback does what "ip addr add IP/32 dev lo label lo:keyfleet" does. Doing it again changes nothing.
func addToLoopback(ip netip.Addr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, set := range []struct {
		req uint
		ip  netip.Addr
	}{{unix.SIOCSIFADDR, ip}, {unix.SIOCSIFNETMASK, netip.MustParseAddr("255.255.255.255")}} {
		ifr, err := unix.NewIfreq("lo:keyfleet")
		if err != nil {
			return err
		}
		if err := ifr.SetInet4Addr(set.ip.AsSlice()); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, set.req, ifr); err != nil {
			return err
		}
	}
	return nil
}

// cloudVendor names the cloud that this machine belongs to by its firmware's words; "" for none that we know.
func cloudVendor() string {
	for _, file := range []string{"sys_vendor", "bios_vendor", "product_name"} {
		b, err := os.ReadFile("/sys/class/dmi/id/" + file)
		if err != nil {
			continue
		}
		for _, vendor := range []string{"Amazon EC2", "Google", "Alibaba Cloud", "OpenStack", "DigitalOcean"} {
			if strings.Contains(string(b), vendor) {
				return vendor
			}
		}
	}
	// Hyper-V says Microsoft everywhere; only Azure has this tag.
	if b, err := os.ReadFile("/sys/class/dmi/id/chassis_asset_tag"); err == nil && strings.TrimSpace(string(b)) == "7783-7084-3265-9085-8269-3286-77" {
		return "Azure"
	}
	return ""
}
