"""Certificates for tests: an authority, and what it signs. Small keys on a curve, so that a test makes dozens."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def _name(common_name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


class Authority:
    """`folder/NAME.pem` is its own certificate."""

    def __init__(self, folder, name="ca"):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(f"Test authority {name}")
        self.count = 0
        now = datetime.datetime.now(datetime.UTC)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        built = (
            x509.CertificateBuilder(self.name, self.name, self.key.public_key(), x509.random_serial_number(), now - DAY, now + 365 * DAY)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = built.public_bytes(serialization.Encoding.PEM)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self.pem)

    def issue(self, file, common_name="", days=(-1, 90), dns=(), uris=(), ips=(), server=False, folder=None):
        """(certificate, key): paths of two PEM files. `days`: from and until when it is valid."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName(n) for n in dns] + [x509.UniformResourceIdentifier(u) for u in uris]
        names += [x509.IPAddress(ipaddress.ip_address(i)) for i in ips]
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = x509.CertificateBuilder(
            self.name, _name(common_name), key.public_key(), x509.random_serial_number(), now + days[0] * DAY, now + days[1] * DAY
        ).add_extension(x509.ExtendedKeyUsage([purpose]), False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer, False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), not common_name)
        made = builder.sign(self.key, hashes.SHA256())
        folder = folder or self.folder
        cert, key_path = folder / f"{file}.pem", folder / f"{file}.key"
        cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        key_path.chmod(0o600)
        return cert, key_path

    def server(self, file="server", **options):
        return self.issue(file, "gateway", dns=["localhost"], ips=["127.0.0.1"], server=True, **options)
