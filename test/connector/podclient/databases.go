package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"os"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Errors about a connection string that cannot be read do not say why: they would
// show the password.

func postgres() (service, error) {
	config, err := pgx.ParseConfig(os.Getenv("AZURE_POSTGRESQL_CONNECTIONSTRING"))
	if err != nil {
		return service{}, errors.New("AZURE_POSTGRESQL_CONNECTIONSTRING cannot be read")
	}
	return service{
		user: config.User,
		use: func(ctx context.Context) error {
			conn, err := pgx.ConnectConfig(ctx, config)
			if err != nil {
				return fmt.Errorf("logging in: %w", err)
			}
			defer conn.Close(ctx)
			if _, err := conn.Exec(ctx, "CREATE TABLE IF NOT EXISTS podclient (word text)"); err != nil {
				return fmt.Errorf("making the table: %w", err)
			}
			word := rand.Text()
			if _, err := conn.Exec(ctx, "INSERT INTO podclient VALUES ($1)", word); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			var found int
			err = conn.QueryRow(ctx, "SELECT count(*) FROM podclient WHERE word = $1", word).Scan(&found)
			return readBack(found == 1, err)
		},
		refused: func(err error) bool {
			var answer *pgconn.PgError
			return errors.As(err, &answer) && (answer.Code == "28P01" || answer.Code == "28000") // by password; no such login
		},
	}, nil
}

func mysqlServer() (service, error) {
	config, err := mysql.ParseDSN(os.Getenv("AZURE_MYSQL_CONNECTIONSTRING"))
	if err != nil {
		return service{}, errors.New("AZURE_MYSQL_CONNECTIONSTRING cannot be read")
	}
	if config.TLS == nil {
		return service{}, errors.New("AZURE_MYSQL_CONNECTIONSTRING asks for no TLS")
	}
	config.Logger = &mysql.NopLogger{}
	connector, err := mysql.NewConnector(config)
	if err != nil {
		return service{}, errors.New("AZURE_MYSQL_CONNECTIONSTRING cannot be used")
	}
	return service{
		user: config.User,
		use: func(ctx context.Context) error {
			db := sql.OpenDB(connector) // the pool makes one connection
			defer db.Close()
			if _, err := db.ExecContext(ctx, "CREATE TABLE IF NOT EXISTS podclient (word text)"); err != nil {
				return fmt.Errorf("logging in and making the table: %w", err)
			}
			word := rand.Text()
			if _, err := db.ExecContext(ctx, "INSERT INTO podclient VALUES (?)", word); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			var found int
			err := db.QueryRowContext(ctx, "SELECT count(*) FROM podclient WHERE word = ?", word).Scan(&found)
			return readBack(found == 1, err)
		},
		refused: func(err error) bool {
			var answer *mysql.MySQLError
			return errors.As(err, &answer) && answer.Number == 1045 // ER_ACCESS_DENIED_ERROR
		},
	}, nil
}

// readBack is how reading ended of what was written.
func readBack(found bool, err error) error {
	if err == nil && !found {
		err = errors.New("what was written is not there")
	}
	if err != nil {
		return fmt.Errorf("reading: %w", err)
	}
	return nil
}
