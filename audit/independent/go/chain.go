package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

const (
	bundle     = 256
	tileHeight = 8
	dayUS      = 86_400_000_000
)

var zero = strings.Repeat("0", 64)

// bad is the first thing that is wrong with a log.
type bad struct{ code, where, why string }

func (b *bad) Error() string { return b.code + " " + b.where + ": " + b.why }

func fail(code, where, why string, facts ...any) *bad {
	return &bad{code, where, fmt.Sprintf(why, facts...)}
}

// publicKey is an audit key: ed25519.PublicKey or *ecdsa.PublicKey on P-256.
type publicKey any

func verifies(key publicKey, message, signature []byte) bool {
	switch k := key.(type) {
	case ed25519.PublicKey:
		return ed25519.Verify(k, message, signature)
	case *ecdsa.PublicKey:
		digest := sha256.Sum256(message)
		return ecdsa.VerifyASN1(k, digest[:], signature)
	}
	return false
}

// tree holds every hash of a log as sumdb's tlog numbers them.
type tree struct {
	n      int64
	hashes []tlog.Hash
}

func (t *tree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	found := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		if index >= int64(len(t.hashes)) {
			return nil, fmt.Errorf("hash %d is not stored", index)
		}
		found[i] = t.hashes[index]
	}
	return found, nil
}

func (t *tree) push(leaf tlog.Hash) {
	more, err := tlog.StoredHashesForRecordHash(t.n, leaf, t)
	if err != nil {
		panic(err) // the reader above holds every hash below n
	}
	t.hashes = append(t.hashes, more...)
	t.n++
}

func (t *tree) root(size int64) tlog.Hash {
	found, err := tlog.TreeHash(size, t)
	if err != nil {
		panic(err)
	}
	return found
}

// checkTiles compares every hash tile of this size, if the export holds hash tiles.
func (t *tree) checkTiles(directory, log string) *bad {
	if info, err := os.Stat(filepath.Join(directory, "tile", "0")); err != nil || !info.IsDir() {
		return nil
	}
	for _, tile := range tlog.NewTiles(tileHeight, 0, t.n) {
		name := strings.Replace(tile.Path(), "tile/8/", "tile/", 1) // C2SP tlog-tiles: the height is always 8
		stored, err := os.ReadFile(filepath.Join(directory, name))
		if err != nil {
			return fail("E_TRUNC", log+"/"+name, "the hash tile is missing")
		}
		computed, err := tlog.ReadTileData(tile, t)
		if err != nil {
			panic(err)
		}
		if !bytes.Equal(stored, computed) {
			return fail("E_DERIVED", log+"/"+name, "the hash tile differs from the entries")
		}
	}
	return nil
}

func bundlePath(number int64, width int) string {
	path := tlog.Tile{H: tileHeight, L: -1, N: number, W: width}.Path()
	return strings.Replace(path, "tile/8/data/", "tile/entries/", 1)
}

func readBundle(directory string, number int64, width int, log string) ([][]byte, *bad) {
	where, name := fmt.Sprintf("%s/%d", log, number*bundle), bundlePath(number, width)
	data, err := os.ReadFile(filepath.Join(directory, name))
	if err != nil {
		return nil, fail("E_TRUNC", where, "entry bundle %s is missing", name)
	}
	var found [][]byte
	for len(data) > 0 {
		if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
			return nil, fail("E_PARSE", where, "a bundle ends in the middle of an entry")
		}
		size := 2 + int(binary.BigEndian.Uint16(data))
		found = append(found, data[2:size])
		data = data[size:]
	}
	if len(found) != width {
		return nil, fail("E_TRUNC", where, "entry bundle holds %d entries, not %d", len(found), width)
	}
	return found, nil
}

// entries reads a log's bundles one after the other.
type entries struct {
	directory, log string
	count, next    int64
	pending        [][]byte
}

func (e *entries) take() ([]byte, *bad) {
	if len(e.pending) == 0 {
		width := min(bundle, e.count-e.next)
		found, problem := readBundle(e.directory, e.next/bundle, int(width), e.log)
		if problem != nil {
			return nil, problem
		}
		e.pending, e.next = found, e.next+width
	}
	first := e.pending[0]
	e.pending = e.pending[1:]
	return first, nil
}

type head struct {
	count int64
	leaf  string
}

// A commitment is what the root log says of a chain at one size, and the number of the entry that says it.
type commitment struct {
	root string
	seq  int64
}

// A mark is a record that names a checkpoint of the root log.
type mark struct {
	at, size int64
	root     string
}

type chain struct {
	log       string
	keys      []publicKey
	n, t      int64
	previous  string
	tree      tree
	tenants   map[string]head
	committed map[int64]commitment
	sizes     []int64 // of committed, those that are still to come
	moved     map[int64]map[string]head
	marks     []mark
	wanted    map[int64]string
	leaves    map[int64]string
	later     int
	good      bool
	touched   map[string]bool
	epoch     int64
	opened    int64
	writer    ed25519.PublicKey
	closed    bool
}

func newChain(log string, keys []publicKey, committed map[int64]commitment, wanted map[int64]string) *chain {
	return &chain{log: log, keys: keys, previous: zero, tenants: map[string]head{}, committed: committed, wanted: wanted,
		sizes: slices.Sorted(maps.Keys(committed)), moved: map[int64]map[string]head{}, leaves: map[int64]string{},
		touched: map[string]bool{}}
}

func (c *chain) at(n int64) string { return c.log + "/" + strconv.FormatInt(n, 10) }

type seal struct {
	day, epoch, first, n, t int64
	head                    string
	signature               []byte
}

var sealFields = []string{"day", "epoch", "first", "head", "n", "seal", "t"}

func readSeals(directory, log string) ([]seal, *bad) {
	data, err := os.ReadFile(filepath.Join(directory, "seals.jsonl"))
	if err != nil {
		return nil, fail("E_MISSING", log+"/0", "seals.jsonl is missing")
	}
	var found []seal
	for number := 0; len(data) > 0; number++ {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		row, problem := canonical(line)
		good := whole && problem == "" && len(row) == len(sealFields)
		for i, name := range sealFields {
			good = good && row[i].name == name
			if good && (name == "head" || name == "seal") {
				s, is := row[i].value.(string)
				good = is && s != "" && len(s)%2 == 0 && hexSet.all(s)
			} else if good {
				good = uint53(row[i].value)
			}
		}
		if !good {
			return nil, fail("E_CANON", fmt.Sprintf("%s/seal %d", log, number), "a line of seals.jsonl is not one of ours")
		}
		signature, _ := hex.DecodeString(row.text("seal"))
		found = append(found, seal{row.number("day"), row.number("epoch"), row.number("first"), row.number("n"), row.number("t"),
			row.text("head"), signature})
		data = rest
	}
	return found, nil
}

func (c *chain) run(directory string) *bad {
	seals, problem := readSeals(directory, c.log)
	if problem != nil {
		return problem
	}
	source := entries{directory: directory, log: c.log}
	for _, s := range seals {
		source.count += s.n
	}
	for _, s := range seals {
		if s.first != c.n {
			return fail("E_SEQ", c.at(c.n), "batch begins at %d", s.first)
		}
		if s.n == 0 {
			return fail("E_SCHEMA", c.at(c.n), "an empty batch")
		}
		for range s.n {
			entry, problem := source.take()
			if problem == nil {
				problem = c.entry(entry, s.first)
			}
			if problem != nil {
				return problem
			}
		}
		problem := c.columns(s)
		if problem == nil {
			problem = c.hold()
		}
		if problem != nil {
			return problem
		}
	}
	if problem := c.tree.checkTiles(directory, c.log); problem != nil {
		return problem
	}
	c.good = true
	return nil
}

// linked checks what every entry has, of a chain or of the root log.
func linked(f frame, log string, n, t int64, previous string) *bad {
	where := log + "/" + strconv.FormatInt(n, 10)
	switch {
	case f.log != log:
		return fail("E_ORIGIN", where, "record belongs to %s", f.log)
	case f.n != n:
		return fail("E_SEQ", where, "sequence number %d", f.n)
	case f.previous != previous:
		return fail("E_LINK", where, "previous-hash does not match record %d", n-1)
	case f.t < t:
		return fail("E_TIME", where, "time runs backwards by %d us", t-f.t)
	}
	return nil
}

func (c *chain) entry(entry []byte, first int64) *bad {
	where, at, before := c.at(c.n), c.n, c.previous
	f, problem := parseFrame(entry)
	if problem != "" {
		return fail(problem, where, "not an entry of this format")
	}
	if problem := linked(f, c.log, c.n, c.t, c.previous); problem != nil {
		return problem
	}
	record, later, problem := parse(f.body, kinds, always)
	if problem != "" {
		return fail(problem, where, "not the canonical bytes of a record")
	}
	if problem := c.take(entry, f, record); problem != nil {
		return problem
	}
	name := record.text("kind")
	if later {
		c.later++
		name = ""
	}
	if name == "open" {
		return c.open(record, at, before, first)
	}
	if c.closed {
		return fail("E_EPOCH", where, "record after the close of epoch %d", c.epoch)
	}
	if name == "close" {
		if record.number("epoch") != c.epoch || record.number("count") != at-c.opened+1 {
			return fail("E_EPOCH", where, "close names another epoch or count")
		}
		c.closed = true
	}
	if pair, is := record.get("root").([]value); name == "mark" && is {
		c.marks = append(c.marks, mark{at, pair[0].(int64), pair[1].(string)})
	}
	return nil
}

func (c *chain) take(entry []byte, f frame, record object) *bad {
	where, tenant := c.at(c.n), record.text("tenant")
	leaf := tlog.RecordHash(entry)
	spelled := hex.EncodeToString(leaf[:])
	if has := record.get("tenant") != nil; has != f.tenant {
		return fail("E_SCHEMA", where, "a tenant's record carries tn and tp, any other carries neither")
	} else if has {
		last, known := c.tenants[tenant]
		if !known {
			last = head{0, zero}
		}
		if f.tn != last.count {
			return fail("E_TSEQ", where, "tenant sequence %d, expected %d", f.tn, last.count)
		}
		if f.tp != last.leaf {
			return fail("E_TLINK", where, "does not follow the tenant's record %d", last.count-1)
		}
		c.tenants[tenant] = head{last.count + 1, spelled}
		c.touched[tenant] = true
	}
	if _, wanted := c.wanted[c.n]; wanted {
		c.leaves[c.n] = spelled
	}
	c.tree.push(leaf)
	c.previous, c.t, c.n = spelled, f.t, c.n+1
	return nil
}

// hold compares with what the root log committed, at the end of each group.
func (c *chain) hold() *bad {
	for len(c.sizes) > 0 && c.sizes[0] <= c.n {
		size := c.sizes[0]
		c.sizes = c.sizes[1:]
		root := c.tree.root(c.n)
		if size != c.n || hex.EncodeToString(root[:]) != c.committed[size].root {
			return fail("E_ROOT", c.at(size), "entry %d of the root log committed another root", c.committed[size].seq)
		}
		c.moved[size] = map[string]head{}
		for name := range c.touched {
			c.moved[size][name] = c.tenants[name]
		}
		c.touched = map[string]bool{}
	}
	return nil
}

func (c *chain) open(record object, at int64, before string, first int64) *bad {
	where, epoch, public := c.at(at), record.number("epoch"), record.text("pub")
	statement := fmt.Sprintf("skms-audit-writer/v1\n%s\n%d\n%d\n%s\n%s\n", c.log, epoch, at, before, public)
	certificate, _ := hex.DecodeString(record.text("cert"))
	certified := false
	for _, key := range c.keys {
		certified = certified || verifies(key, []byte(statement), certificate)
	}
	switch {
	case !certified:
		return fail("E_CERT", where, "no trusted audit key certified this writer")
	case epoch <= c.epoch:
		return fail("E_EPOCH", where, "epoch %d after epoch %d", epoch, c.epoch)
	case at != first:
		return fail("E_EPOCH", where, "a writer opens with a batch of its own")
	}
	c.epoch, c.opened, c.closed = epoch, at, false
	c.writer, _ = hex.DecodeString(public)
	return nil
}

func (c *chain) columns(s seal) *bad {
	where, last := c.at(s.first), c.at(c.n-1)
	switch {
	case c.writer == nil:
		return fail("E_CERT", where, "no certified writer")
	case s.epoch != c.epoch:
		return fail("E_EPOCH", where, "batch says epoch %d, its writer's is %d", s.epoch, c.epoch)
	case s.t != c.t:
		return fail("E_DERIVED", last, "stored column t differs from the entries")
	case s.head != c.previous:
		return fail("E_DERIVED", last, "stored column head differs from the entries")
	case s.day != c.t/dayUS:
		return fail("E_DERIVED", last, "stored column day differs from the entries")
	}
	statement := fmt.Sprintf("skms-audit-seal/v1\n%s\n%d\n%d\n%d\n%s\n", c.log, s.epoch, s.first, s.n, c.previous)
	if !ed25519.Verify(c.writer, []byte(statement), s.signature) {
		return fail("E_SEAL", where, "not sealed by the certified writer of this epoch")
	}
	return nil
}
