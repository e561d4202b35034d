package pool

import (
	"context"
	"regexp"
	"strings"

	"keyfleet.dev/keyfleet/api/arm"
	"keyfleet.dev/keyfleet/internal/access"
	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/store"
)

// Account is a stored Batch account. Its id is the resource id's store key.
type Account = store.Object[AccountSpec, AccountStatus]

// Accounts is the collection of Batch accounts.
var Accounts = store.NewCollection[AccountSpec, AccountStatus]("batchaccounts")

// AccountSpec is what a Batch account should be.
type AccountSpec struct {
	ID       string            `json:"id"` // resource id, in the casing of the request that created it
	Location string            `json:"location"`
	Tags     map[string]string `json:"tags,omitempty"`
}

// AccountStatus is what was seen of an account: nothing yet.
type AccountStatus struct{}

// accountHost reserves the host name ACCOUNT.REGION of an account. Its id is "REGION/ACCOUNT".
type accountHost struct {
	Account string `json:"account"` // store id
}

var accountHosts = store.NewCollection[accountHost, struct{}]("batchhosts")

var (
	accountName = regexp.MustCompile(`^[a-z0-9]{3,24}$`)
	regionName  = regexp.MustCompile(`^[a-z0-9]{1,40}$`)
)

// Groups answers whether a resource group exists.
type Groups interface {
	// Check returns nil, or the fault that ARM clients know.
	Check(ctx context.Context, subscription, group string) error
}

func accountID(id arm.ID) error {
	if !id.Is("Microsoft.Batch/batchAccounts") || id.ResourceGroup == "" {
		return fault.New(fault.Invalid, "InvalidResourceID", "%q is not the id of a Batch account.", id.String())
	}
	if !accountName.MatchString(strings.ToLower(id.Name())) { // an account that is there is found in any casing
		return invalidAccountName(id)
	}
	return nil
}

func invalidAccountName(id arm.ID) error {
	return fault.New(fault.Invalid, "InvalidResourceName", "The account name %q is not valid: 3 to 24 lower-case letters and digits are.", id.Name()).At("name")
}

// Region is the location as it stands in host names: lower case, no blanks.
func (s AccountSpec) Region() string { return strings.ToLower(strings.ReplaceAll(s.Location, " ", "")) }

// Name is the account's name.
func (s AccountSpec) Name() string { return s.ID[strings.LastIndexByte(s.ID, '/')+1:] }

func accountNotFound(id arm.ID) error {
	return fault.New(fault.NotFound, "ResourceNotFound", "The Resource 'Microsoft.Batch/batchAccounts/%s' under resource group '%s' was not found.", id.Names[0], id.ResourceGroup).
		WithFix("create it: keyfleet account create %[2]s --group %[1]s", id.ResourceGroup, id.Names[0])
}

// PutAccount creates an account, or changes the tags of one that is there. Its
// location cannot change, for it is part of its host name.
func (f *Fleet) PutAccount(ctx context.Context, id arm.ID, location string, tags map[string]string) (a *Account, created bool, err error) {
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/write", Resource: id.String()}
	err = f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) (err error) {
		if err := accountID(id); err != nil {
			return err
		}
		if f.cfg.Groups != nil {
			if err := f.cfg.Groups.Check(tx.Context(), id.Subscription, id.ResourceGroup); err != nil {
				return err
			}
		}
		a, created, err = f.putAccount(tx, id, AccountSpec{ID: id.String(), Location: location, Tags: tags})
		return err
	})
	return a, created, err
}

func (f *Fleet) putAccount(tx *store.Tx, id arm.ID, s AccountSpec) (_ *Account, created bool, _ error) {
	if !regionName.MatchString(s.Region()) {
		return nil, false, fault.New(fault.Invalid, "LocationRequired", "The location %q is not a name of letters and digits.", s.Location).At("location").
			WithFix("name a location; it becomes part of the account's host name")
	}
	a, err := Accounts.Lookup(tx, id.StoreKey())
	if err != nil {
		return nil, false, err
	}
	if a != nil {
		switch {
		case !a.Deleting.IsZero():
			return nil, false, fault.New(fault.Conflict, "AccountBeingDeleted", "The account %q is being deleted.", id.Name())
		case a.Spec.Region() != s.Region():
			return nil, false, fault.New(fault.Conflict, "InvalidResourceLocation", "The account %q exists in location %q and cannot move to %q.", id.Name(), a.Spec.Location, s.Location).At("location")
		}
		a.Spec.Tags = s.Tags
		return a, false, Accounts.Put(tx, a)
	}
	if !accountName.MatchString(id.Name()) {
		return nil, false, invalidAccountName(id)
	}
	h := &store.Object[accountHost, struct{}]{Spec: accountHost{Account: id.StoreKey()}}
	h.ID = s.Region() + "/" + strings.ToLower(id.Name())
	if taken, err := accountHosts.Lookup(tx, h.ID); err != nil {
		return nil, false, err
	} else if taken != nil {
		return nil, false, fault.New(fault.Conflict, "AccountAlreadyTaken", "An account named %q exists already in location %q.", id.Name(), s.Location).At("name").
			WithFix("choose another name or location")
	}
	if err := accountHosts.Insert(tx, h); err != nil {
		return nil, false, err
	}
	a = &Account{Spec: s}
	a.ID = id.StoreKey()
	return a, true, Accounts.Insert(tx, a)
}

// PatchAccount changes the tags of an account.
func (f *Fleet) PatchAccount(ctx context.Context, id arm.ID, tags map[string]string) (*Account, error) {
	var a *Account
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/write", Resource: id.String()}
	err := f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) (err error) {
		if a, err = f.account(tx, id); err != nil || tags == nil {
			return err
		}
		a.Spec.Tags = tags
		return Accounts.Put(tx, a)
	})
	return a, err
}

func (f *Fleet) account(tx *store.Tx, id arm.ID) (*Account, error) {
	if err := accountID(id); err != nil {
		return nil, err
	}
	a, err := Accounts.Lookup(tx, id.StoreKey())
	if err == nil && a == nil {
		err = accountNotFound(id)
	}
	return a, err
}

// GetAccount returns an account.
func (f *Fleet) GetAccount(ctx context.Context, id arm.ID) (*Account, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: "Microsoft.Batch/batchAccounts/read", Resource: id.String()}); err != nil {
		return nil, err
	}
	return f.account(f.cfg.Store.View(ctx), id)
}

// ListAccounts returns the accounts of a subscription or of a resource group.
func (f *Fleet) ListAccounts(ctx context.Context, scope arm.ID) ([]*Account, error) {
	if err := f.cfg.Gate.Read(ctx, access.Op{Action: "Microsoft.Batch/batchAccounts/read", Resource: scope.String()}); err != nil {
		return nil, err
	}
	prefix := strings.ToLower(scope.Subscription) + "/"
	if scope.ResourceGroup != "" {
		prefix += strings.ToLower(scope.ResourceGroup) + "/"
	}
	return Accounts.List(f.cfg.Store.View(ctx), prefix)
}

// DeleteAccount removes an account and asks for the deletion of its pools.
// gone says that there was nothing to delete.
func (f *Fleet) DeleteAccount(ctx context.Context, id arm.ID) (gone bool, err error) {
	op := access.Op{Action: "Microsoft.Batch/batchAccounts/delete", Resource: id.String()}
	err = f.cfg.Gate.Change(ctx, f.cfg.Store, op, func(tx *store.Tx) error {
		gone = false
		if err := accountID(id); err != nil {
			return err
		}
		a, err := Accounts.Lookup(tx, id.StoreKey())
		if err != nil {
			return err
		}
		if a == nil {
			gone = true
			return nil
		}
		pools, err := Pools.List(tx, a.ID+"/")
		if err != nil {
			return err
		}
		for _, p := range pools {
			if err := f.deletePool(tx, p.ID); err != nil {
				return err
			}
		}
		if err := accountHosts.Delete(tx, a.Spec.Region()+"/"+strings.ToLower(a.Spec.Name())); err != nil {
			return err
		}
		return Accounts.Delete(tx, a.ID)
	})
	return gone, err
}

// AccountAt returns the resource id of the account behind a data-plane host,
// ACCOUNT.REGION. It decides nothing: the operation that follows does.
func (f *Fleet) AccountAt(ctx context.Context, name, region string) (arm.ID, error) {
	tx := f.cfg.Store.View(ctx)
	h, err := accountHosts.Lookup(tx, strings.ToLower(region+"/"+name))
	if err != nil {
		return arm.ID{}, err
	}
	if h == nil {
		return arm.ID{}, fault.New(fault.NotFound, "AccountNotFound", "There is no Batch account %q in location %q.", name, region).
			WithFix("check the account's endpoint: az batch account show --query accountEndpoint")
	}
	a, err := Accounts.Get(tx, h.Spec.Account)
	if err != nil {
		return arm.ID{}, err
	}
	return arm.ParseID(a.Spec.ID)
}
