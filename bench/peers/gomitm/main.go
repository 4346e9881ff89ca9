// A TLS-intercepting proxy of the standard library alone: it mints ECDSA P-256 leaves, adds one header, and verifies and
// pools its upstreams. What a good afternoon's work in Go comes to; no policy, no audit, no limits.
//
//	gomitm PORT CA.pem CA.key UPSTREAM-CA.pem UPSTREAM-PORT CREDENTIAL
package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"sync"
	"time"
)

var (
	ca         tls.Certificate
	leafKey    *ecdsa.PrivateKey
	leaves     sync.Map // host name -> *tls.Certificate
	credential string
	transport  *http.Transport
	http2Conns = make(handed)
)

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func leaf(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if found, ok := leaves.Load(hello.ServerName); ok {
		return found.(*tls.Certificate), nil
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: hello.ServerName},
		DNSNames:     []string{hello.ServerName},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Leaf, &leafKey.PublicKey, ca.PrivateKey)
	if err != nil {
		return nil, err
	}
	minted := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: leafKey}
	leaves.Store(hello.ServerName, minted)
	return minted, nil
}

// intercept answers a CONNECT and serves what comes through it.
func intercept(conn net.Conn, config *tls.Config) {
	connect, err := http.ReadRequest(bufio.NewReaderSize(conn, 1024))
	if err != nil || connect.Method != http.MethodConnect {
		conn.Close()
		return
	}
	io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
	client := tls.Server(conn, config)
	if client.Handshake() == nil && client.ConnectionState().NegotiatedProtocol == "h2" {
		http2Conns <- client
		return
	}
	serve(client, connect.Host)
	client.Close()
}

// serve is the HTTP/1.1 loop, without the goroutine and the buffers a second http.Server would add.
func serve(client *tls.Conn, host string) {
	reader, writer := bufio.NewReader(client), bufio.NewWriter(client)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		request.URL.Scheme, request.URL.Host, request.RequestURI = "https", host, ""
		request.Header.Set("Authorization", credential)
		answer, err := transport.RoundTrip(request)
		if err != nil {
			answer = &http.Response{StatusCode: 502, ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody, Close: true}
		}
		if answer.ContentLength < 0 {
			err = stream(writer, answer)
		} else {
			err = answer.Write(writer)
		}
		answer.Body.Close()
		if err != nil || writer.Flush() != nil || request.Close || answer.Close {
			return
		}
	}
}

// stream passes on a body of unknown length as it comes.
func stream(writer *bufio.Writer, answer *http.Response) error {
	writer.WriteString("HTTP/1.1 " + answer.Status + "\r\nTransfer-Encoding: chunked\r\n")
	answer.Header.Write(writer)
	writer.WriteString("\r\n")
	chunks := httputil.NewChunkedWriter(writer)
	buffer := make([]byte, 32*1024)
	for {
		n, err := answer.Body.Read(buffer)
		if n > 0 {
			chunks.Write(buffer[:n])
			if failed := writer.Flush(); failed != nil {
				return failed
			}
		}
		if err == io.EOF {
			chunks.Close()
			writer.WriteString("\r\n")
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// handed is a listener of the connections that speak HTTP/2, for net/http's own server.
type handed chan net.Conn

func (h handed) Accept() (net.Conn, error) { return <-h, nil }
func (h handed) Close() error              { return nil }
func (h handed) Addr() net.Addr            { return &net.TCPAddr{} }

func main() {
	ca = must(tls.LoadX509KeyPair(os.Args[2], os.Args[3]))
	ca.Leaf = must(x509.ParseCertificate(ca.Certificate[0]))
	leafKey = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	credential = os.Args[6]
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(os.Args[4])))
	upstream := net.JoinHostPort("127.0.0.1", os.Args[5])
	transport = &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, upstream)
		},
		TLSClientConfig:     &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(1024)},
		MaxIdleConns:        1024,
		MaxIdleConnsPerHost: 64,
		DisableCompression:  true,
		IdleConnTimeout:     time.Minute,
	}
	listener := must(net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(must(strconv.Atoi(os.Args[1])))))
	config := &tls.Config{GetCertificate: leaf, NextProtos: []string{"h2", "http/1.1"}}
	go serveHTTP2()
	for {
		go intercept(must(listener.Accept()), config)
	}
}

func serveHTTP2() {
	forward := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "https", r.In.Host
			r.Out.Header.Set("Authorization", credential)
		},
	}
	server := &http.Server{Handler: forward, TLSConfig: &tls.Config{NextProtos: []string{"h2"}}}
	log.Fatal(server.Serve(http2Conns))
}
