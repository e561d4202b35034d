package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/gomodule/redigo/redis"
	amqp "github.com/rabbitmq/amqp091-go"
)

func redisServer() (service, error) {
	address := os.Getenv("AZURE_REDIS_CONNECTIONSTRING")
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "rediss" {
		return service{}, errors.New("AZURE_REDIS_CONNECTIONSTRING is no URL with TLS")
	}
	return service{
		user: u.User.Username(),
		use: func(ctx context.Context) error {
			conn, err := redis.DialURLContext(ctx, address)
			if err != nil {
				return fmt.Errorf("logging in: %w", err)
			}
			defer conn.Close()
			word := rand.Text()
			if _, err := redis.DoContext(conn, ctx, "SET", "podclient:"+word, word, "EX", 60); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
			found, err := redis.String(redis.DoContext(conn, ctx, "GET", "podclient:"+word))
			return readBack(found == word, err)
		},
		refused: func(err error) bool { return strings.Contains(err.Error(), "WRONGPASS") },
	}, nil
}

func rabbitmq() (service, error) {
	address := os.Getenv("RABBITMQ_CONNECTIONSTRING")
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "amqps" {
		return service{}, errors.New("RABBITMQ_CONNECTIONSTRING is no URL with TLS")
	}
	return service{
		user: u.User.Username(),
		use: func(ctx context.Context) error {
			conn, err := amqp.Dial(address)
			if err != nil {
				return fmt.Errorf("logging in: %w", err)
			}
			defer conn.Close()
			return exchangeMessage(ctx, conn)
		},
		refused: func(err error) bool {
			var answer *amqp.Error
			return errors.As(err, &answer) && answer.Code == amqp.AccessRefused
		},
	}, nil
}

// exchangeMessage sends a message and takes it, by a queue that goes with the connection.
func exchangeMessage(ctx context.Context, conn *amqp.Connection) error {
	ch, err := conn.Channel()
	if err != nil {
		return fmt.Errorf("opening a channel: %w", err)
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return fmt.Errorf("making the queue: %w", err)
	}
	if err := ch.Confirm(false); err != nil {
		return fmt.Errorf("asking for confirmations: %w", err)
	}
	word := rand.Text()
	taken, err := ch.PublishWithDeferredConfirm("", q.Name, true, false, amqp.Publishing{Body: []byte(word)})
	if err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	if ok, err := taken.WaitContext(ctx); err != nil || !ok {
		return fmt.Errorf("writing: taken is %t: %w", ok, err)
	}
	m, ok, err := ch.Get(q.Name, true)
	return readBack(ok && string(m.Body) == word, err)
}
