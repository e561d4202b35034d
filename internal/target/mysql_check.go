package target

import (
	"context"
	"slices"
	"strings"

	"keyfleet.dev/keyfleet/internal/fault"
)

func (m mariadb) check(ctx context.Context) ([]string, error) {
	s, err := m.connect(ctx, "", m.Admin)
	if err != nil {
		return nil, err
	}
	defer s.close()
	return nil, m.capable(ctx, s)
}

// capable fails unless the administrator can make logins, end their sessions and
// hand on what they get, and the server checks passwords in a way we can compute.
func (m mariadb) capable(ctx context.Context, s session) error {
	var account string
	if err := s.QueryRowContext(ctx, "SELECT CURRENT_USER()").Scan(&account); err != nil {
		return m.explain("looking at the administrator", err)
	}
	at := strings.LastIndex(account, "@") // an account is USER@HOST
	grantee := "'" + account[:at] + "'@'" + account[at+1:] + "'"
	everywhere, err := texts(s.QueryContext(ctx, "SELECT concat(PRIVILEGE_TYPE, if(IS_GRANTABLE = 'YES', '+', '')) FROM information_schema.USER_PRIVILEGES WHERE GRANTEE = ?", grantee))
	if err != nil {
		return m.explain("looking at the administrator's privileges", err)
	}
	inside, err := texts(s.QueryContext(ctx, "SELECT concat(PRIVILEGE_TYPE, if(IS_GRANTABLE = 'YES', '+', '')) FROM information_schema.SCHEMA_PRIVILEGES WHERE GRANTEE = ? AND ? LIKE TABLE_SCHEMA", grantee, m.Database))
	if err != nil {
		return m.explain("looking at the administrator's privileges", err)
	}
	if err := m.permissions(lacking(everywhere, inside, m.Database, grantee)); err != nil {
		return err
	}
	return m.supports(ctx, s)
}

// supports fails unless logins with mysql_native_password can be made, and the database is there.
func (m mariadb) supports(ctx context.Context, s session) error {
	var active int
	if err := s.QueryRowContext(ctx, "SELECT count(*) FROM information_schema.PLUGINS WHERE PLUGIN_NAME = 'mysql_native_password' AND PLUGIN_STATUS = 'ACTIVE'").Scan(&active); err != nil {
		return m.explain("looking at the server's plugins", err)
	}
	if active == 0 {
		return m.noPlugin()
	}
	if m.Database == "" {
		return nil
	}
	var there int
	if err := s.QueryRowContext(ctx, "SELECT count(*) FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = ?", m.Database).Scan(&there); err != nil {
		return m.explain("looking for the database", err)
	}
	if there == 0 {
		return m.notFound("database", nil)
	}
	return nil
}

func (m mariadb) noPlugin() error {
	return fault.New(fault.Conflict, codeUnsupported, "The server '%s' has no mysql_native_password, the one way to make a login without sending its password.", m.address()).At(m.at()).
		WithFix("start the server with --mysql-native-password=ON (MySQL 8.4), or give the connection a login of your own")
}

// lacking compares what an administrator has, everywhere and on the database, with
// what is needed. A privilege that may be handed on ends in '+'.
func lacking(everywhere, inside []string, database, grantee string) []missing {
	anywhere := func(privilege string) bool {
		return slices.Contains(everywhere, privilege) || slices.Contains(everywhere, privilege+"+")
	}
	var lack []missing
	for _, alternatives := range [][]string{{"CREATE USER"}, {"PROCESS"}, {"CONNECTION ADMIN", "CONNECTION_ADMIN", "SUPER"}, {"SELECT"}} {
		if !slices.ContainsFunc(alternatives, anywhere) {
			lack = append(lack, missing{alternatives[0], "GRANT " + alternatives[0] + " ON *.* TO " + grantee + ";"})
		}
	}
	var hand []string
	for _, p := range databasePrivileges {
		if database != "" && !slices.Contains(everywhere, p+"+") && !slices.Contains(inside, p+"+") {
			hand = append(hand, p)
		}
	}
	if len(hand) > 0 {
		list := strings.Join(hand, ", ")
		lack = append(lack, missing{list + " on the database, with grant option", "GRANT " + list + " ON " + grantedDatabase(database) + ".* TO " + grantee + " WITH GRANT OPTION;"})
	}
	return lack
}
