package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"keyfleet.dev/keyfleet/api/keyfleet"
	"keyfleet.dev/keyfleet/client"
)

const (
	containerService = "Microsoft.ContainerService"
	managedClusters  = "managedClusters"
)

func (t *tool) clusterView() view[object] {
	enabled := func(path string) func(object) string {
		return func(o object) string {
			if o.at(path) == nil {
				return "not known"
			}
			if o.str(path) == "true" {
				return "yes"
			}
			return "no"
		}
	}
	return objectView(
		field("Name", "name"), derived("Group", object.group), field("State", "properties.provisioningState"), field("Version", "properties.currentKubernetesVersion"),
		derived("Nodes ready", func(o object) string {
			if o.str("properties.currentKubernetesVersion") == "" {
				return ""
			}
			return o.str("properties.observed.ready") + "/" + o.str("properties.observed.nodes")
		}),
	).with(only(
		field("Reason", "properties.observed.reason"), field("Server", "properties.observed.server"), t.timeAt("Seen", "properties.observed.time"),
		field("Issuer", "properties.oidcIssuerProfile.issuerURL"), derived("Workload identity", enabled("properties.securityProfile.workloadIdentity.enabled")),
		derived("Key Vault add-on", enabled("properties.addonProfiles.azureKeyvaultSecretsProvider.enabled")),
		derived("Missing permissions", func(o object) string { return strings.Join(o.strs("properties.observed.missingPermissions"), "; ") }),
		derived("SSH access", sshCell), derived("Rotation", t.rotationCell),
		field("Location", "location"), field("Id", "id"),
	)...)
}

// findCluster finds a cluster by its name or resource id.
func (t *tool) findCluster(ctx context.Context, name string) (object, error) {
	if strings.HasPrefix(name, "/") {
		c, err := t.connect(ctx)
		if err != nil {
			return object{}, err
		}
		return t.call(ctx, request(http.MethodGet, c.ARM(name), client.VersionClusters, nil))
	}
	return t.find(ctx, containerService, managedClusters, "cluster", name, client.VersionClusters)
}

func (t *tool) clusterCommand() *cobra.Command {
	list := t.verb("list", "List the registered clusters of the subscription", "", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		all, err := t.listResources(ctx, containerService, managedClusters, client.VersionClusters)
		if err != nil {
			return err
		}
		return many(t, all, t.clusterView())
	})
	show := t.verb("show NAME", "Show what was last seen of a cluster", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		o, err := t.findCluster(ctx, args[0])
		if err != nil {
			return err
		}
		return one(t, o, t.clusterView())
	})
	var yes bool
	del := t.verb("delete NAME", "Forget a cluster; nothing on it is touched", "", cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		o, err := t.findCluster(ctx, args[0])
		if err != nil {
			return err
		}
		if err := t.confirm(yes, "Cluster %s will be forgotten, and its kubeconfig with it; identities that trust it trust it no more", o.name()); err != nil {
			return err
		}
		return t.deleteURL(ctx, t.client.ARM(o.str("id")), client.VersionClusters, true, "Cluster "+o.name(), "keyfleet cluster list")
	})
	del.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return t.noun("cluster", "Registered Kubernetes clusters", t.clusterRegister(), list, show, t.clusterKubeconfig(), t.clusterRotate(), del, t.noun("manager", "Programs that look after clusters", t.managerCreate()))
}

func (t *tool) clusterRegister() *cobra.Command {
	var location, file string
	var tagFlags []string
	var ssh sshFlags
	c := t.verb("register NAME", "Register a cluster that exists, or give it another kubeconfig or SSH access", `
keyfleet cluster register prod --group rg1 --kubeconfig kubeconfig.yaml
kubectl config view --raw --flatten --minify | keyfleet cluster register prod --group rg1 --kubeconfig -
keyfleet cluster register prod --group rg1 --ssh-host cp1.example.org --ssh-user ops --ssh-key-file key --ssh-known-hosts-file known_hosts`, cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			properties := map[string]any{}
			if file != "" {
				text, err := t.readBody(file)
				if err != nil {
					return err
				}
				properties["kubeconfig"] = string(text)
			}
			access, err := t.access(ssh)
			if err != nil {
				return err
			}
			if access != nil {
				properties["ssh"] = access
			}
			u, loc, err := t.newResource(ctx, location, containerService, managedClusters, args[0])
			if err != nil {
				return err
			}
			tags, err := tagsOf(tagFlags)
			if err != nil {
				return err
			}
			body := map[string]any{"location": loc, "tags": tags, "properties": properties}
			if file == "" { // it is there already, and stays as it is but for the SSH access
				was, err := t.call(ctx, request(http.MethodGet, u, client.VersionClusters, nil))
				if err != nil {
					return err
				}
				body["location"] = was.at("location")
				if len(tagFlags) == 0 {
					body["tags"] = was.at("tags")
				}
			}
			o, err := t.call(ctx, request(http.MethodPut, u, client.VersionClusters, body))
			if err != nil {
				return err
			}
			return changed(t, o, t.clusterView(), "Cluster %s is registered; it is %s.", args[0], o.str("properties.provisioningState"))
		})
	c.Flags().StringVar(&file, "kubeconfig", "", "kubeconfig whose current context is the cluster, with everything inside; - is standard input")
	ssh.declare(c.Flags())
	c.Flags().StringVarP(&location, "location", "l", "", "location (default: the group's)")
	c.Flags().StringArrayVar(&tagFlags, "tag", nil, "NAME=VALUE; may be repeated")
	c.MarkFlagsOneRequired("kubeconfig", "ssh-host")
	return c
}

func (t *tool) clusterKubeconfig() *cobra.Command {
	var file string
	c := t.verb("kubeconfig NAME", "Write the kubeconfig of a cluster into a file", "keyfleet cluster kubeconfig prod --to-file kubeconfig.yaml", cobra.ExactArgs(1),
		func(ctx context.Context, args []string) error {
			o, err := t.findCluster(ctx, args[0])
			if err != nil {
				return err
			}
			got, err := t.call(ctx, request(http.MethodPost, t.client.ARM(o.str("id")+"/listClusterUserCredential"), client.VersionClusters, nil))
			if err != nil {
				return err
			}
			all := got.objects("kubeconfigs")
			if len(all) == 0 {
				return errors.New("the server answered without a kubeconfig")
			}
			text, err := base64.StdEncoding.DecodeString(all[0].str("value"))
			if err != nil {
				return fmt.Errorf("reading the kubeconfig: %w", err)
			}
			return t.newFile(file, text)
		})
	c.Flags().StringVar(&file, "to-file", "", "new file, made with mode 0600 (required)")
	_ = c.MarkFlagRequired("to-file")
	return c
}

const managerRole = "Keyfleet Cluster Manager"

// managerCreate makes an application that may look after clusters, and writes its
// login into a folder that keyfleet-connector reads.
func (t *tool) managerCreate() *cobra.Command {
	var dir string
	c := t.verb("create NAME", "Make a login for keyfleet-connector", `
keyfleet cluster manager create connector --to-dir /etc/keyfleet-connector
keyfleet-connector manager --from /etc/keyfleet-connector`, cobra.ExactArgs(1), func(ctx context.Context, args []string) error {
		role, err := t.role(ctx, managerRole)
		if err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
			return usagef("%s exists already", dir).withFix("remove it, or name another folder")
		} else if err != nil {
			return fmt.Errorf("making the folder: %w", err)
		}
		if err := t.makeManager(ctx, args[0], dir, role); err != nil {
			return errors.Join(err, os.RemoveAll(dir)) // it was made here; the same command can be given again
		}
		return t.done("The login of %s is in %s. Run: keyfleet-connector manager --from %s", args[0], dir, dir)
	})
	c.Flags().StringVar(&dir, "to-dir", "", "new folder, made with mode 0700 (required)")
	_ = c.MarkFlagRequired("to-dir")
	return c
}

// makeManager makes an application with the role, and writes its login into a folder.
// Where that fails the application goes again.
func (t *tool) makeManager(ctx context.Context, name, dir string, role object) error {
	u, err := t.applicationURL(ctx)
	if err != nil {
		return err
	}
	app, err := t.call(ctx, request(http.MethodPost, u, "", map[string]any{"displayName": name}))
	if err != nil {
		return err
	}
	oid := app.str("id")
	grant := t.client.AtScope("/", "roleAssignments/"+grantName("/", oid, role.name()))
	body := map[string]any{"properties": map[string]string{"roleDefinitionId": role.str("id"), "principalId": oid}}
	_, err = t.call(ctx, request(http.MethodPut, grant, client.VersionRoles, body))
	if err == nil {
		err = t.writeLogin(dir, app)
	}
	if err == nil {
		return nil
	}
	u, gone := t.applicationURL(ctx, app.str("appId"))
	if gone == nil {
		_, gone = t.client.Do(ctx, request(http.MethodDelete, u, "", nil))
	}
	if gone != nil {
		return fmt.Errorf("%w; the application %s stays: %w", err, app.str("appId"), gone)
	}
	return err
}

// writeLogin writes admin.json and ca.crt, as a server does into its data directory.
func (t *tool) writeLogin(dir string, app object) error {
	tg := t.target
	login := keyfleet.Admin{
		Endpoints: tg.Endpoints, Tenant: tg.Tenant, Subscription: tg.Subscription, ClientID: app.str("appId"), ClientSecret: keyfleet.Secret(app.str("secretText")),
	}
	quiet := *t
	quiet.flags.output = "none"
	if tg.CA != "" {
		login.CAFile = "ca.crt"
		if err := quiet.newFile(filepath.Join(dir, login.CAFile), []byte(tg.CA)); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(login, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the login: %w", err)
	}
	return quiet.newFile(filepath.Join(dir, "admin.json"), append(text, '\n'))
}
